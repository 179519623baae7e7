"Scores of part maps against brute force, sources against what must not matter, files against tampering."
import gc
import weakref
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from conftest import ROOT, painted, placeless_encoder, small_encoder
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from semmae.core import SemmaeError, generator
from semmae.images import FIT, ImageSet, read_maps, resized_parts, write_maps
from semmae.parts import (SOURCES, consistency, foreground_iou, matching, open_parts, part_source, read_cub,
                          score_images, score_keypoints, score_parts)
from semmae.pipeline.maps import make_parts
from semmae.pipeline.parts import called_iou, control, hardest, judge_parts
from semmae.pipeline.regions import closest, regions
from semmae.pipeline.report import few_maps
from semmae.sources import load_images
from semmae.vit import pixels_of
from semmae.weights import save_encoder


def maps(seed, n=6, labels=5, grid=(6, 7)):
    return torch.randint(0, labels, (n, *grid), generator=generator('maps', seed, labels))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 5))
def test_consistency_is_sklearns_on_the_cells_and_does_not_know_names(seed, n_pred, n_true):
    pred, true = maps(seed, labels=n_pred), maps(seed + 1, labels=n_true)
    s, fg = consistency(pred, true), (true != 0).flatten()
    p, t = pred.flatten(), true.flatten()
    assert (s['nmi'] == pytest.approx(normalized_mutual_info_score(t, p))
            and s['fg_ari'] == pytest.approx(adjusted_rand_score(t[fg], p[fg])))
    other = consistency(torch.randperm(n_pred, generator=generator(seed))[pred], true)
    for k in ('fg_nmi', 'fg_ari', 'nmi', 'ari', 'fg_iou'):
        assert s[k] == pytest.approx(other[k])
    assert sorted(s['share']) == pytest.approx(sorted(other['share'])) and sum(s['share']) == pytest.approx(1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 4))
def test_images_are_scored_one_by_one_by_brute_force(seed, n_pred, n_true):
    pred, true = maps(seed, labels=n_pred, grid=(3, 4)), maps(seed + 1, labels=n_true, grid=(3, 4))
    true[0] *= true[0] == 1  # an image with one part at most
    scores = score_images(pred, true)
    for k, (p, t) in enumerate(zip(pred, true)):
        front, there = t > 0, t[t > 0].unique().tolist()
        best = [max(float(((p == i) & (t == j)).sum()/((p == i) | (t == j)).sum()) for i in range(n_pred))
                for j in there]
        held = p[front].bincount()/max(1, front.sum())
        expected = dict.fromkeys(('fg_nmi', 'fg_ari', 'labels', 'one_label', 'mbo'), np.nan)
        expected |= dict(mbo=np.mean(best)) if best else {}
        if len(there) > 1:
            expected |= dict(fg_nmi=normalized_mutual_info_score(t[front], p[front]),
                             fg_ari=adjusted_rand_score(t[front], p[front]),
                             labels=np.exp(-sum(q*np.log(q) for q in held.tolist() if q)),
                             one_label=float(held.max() >= .8))
        assert {name: float(v[k]) for name, v in scores.items()} == pytest.approx(expected, nan_ok=True)


def test_names_of_its_own_in_every_image_do_no_harm_but_to_consistency():
    true = maps(0, n=30, labels=4)
    own = torch.stack([torch.randperm(4, generator=generator(k))[t] for k, t in enumerate(true)])
    scores = score_parts(own, true)
    assert [scores[k] for k in ('fg_nmi', 'fg_ari', 'mbo')] == pytest.approx([1, 1, 1])
    assert scores['consistency']['fg_nmi'] < .1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_the_matching_is_the_best_of_all(seed):
    table = np.random.default_rng(seed).integers(0, 20, (4, 4))
    iou = table/np.maximum(table.sum(1, keepdims=True) + table.sum(0) - table, 1)
    assert matching(table)[2].sum() == pytest.approx(max(sum(iou[i, p[i]] for i in range(4))
                                                         for p in permutations(range(4))))


def test_truth_of_other_images_takes_the_score_away():
    true = maps(3, n=40, grid=(12, 12))
    assert score_parts(true, true)['fg_nmi'] == pytest.approx(1) and control(true, true)['fg_nmi'] < .1
    place = torch.arange(144).view(1, 12, 12).expand(40, -1, -1)//36  # what is position alone stays
    assert control(place, place)['fg_nmi'] == pytest.approx(1)


def test_true_parts_are_read_by_majority():
    fine = maps(5, grid=(4, 4)).repeat_interleave(5, 1).repeat_interleave(5, 2)
    speckled = fine.clone()
    speckled[:, ::5, ::5] = 4
    assert consistency(maps(5, grid=(4, 4)), speckled)['nmi'] == pytest.approx(1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_the_foreground_is_that_of_the_best_set_of_labels(seed):
    rng = np.random.default_rng(seed)
    cells = rng.integers(1, 30, 5)
    inside = np.array([rng.integers(0, n + 1) for n in cells])
    inside[0] = max(1, inside[0])
    iou = lambda s: inside[s].sum()/(inside.sum() + (cells - inside)[s].sum())
    assert foreground_iou(inside, cells) == pytest.approx(max(iou(list(s)) for n in range(1, 6)
                                                              for s in combinations(range(5), n)))


IMAGES = {k: torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator('images', k))
          for k, n in dict(train=9, val=3, test=4).items()}


def splits(parts=None):
    return {k: ImageSet(x, parts=parts and parts[k]) for k, x in IMAGES.items()}


def test_maps_that_come_with_the_images_and_maps_in_a_folder(tmp_path):
    given = {k: torch.randint(0, 3, (len(x), 4, 4), dtype=torch.uint8, generator=generator('given', k))
             for k, x in IMAGES.items()}
    made = make_parts(splits(given), source='given')
    write_maps(tmp_path/'mine', made, IMAGES)
    for k, maps in make_parts(splits(), source='mine', root=tmp_path).items():
        assert torch.equal(maps, given[k])
    with pytest.raises(SemmaeError, match='parts.source'):
        make_parts(splits(), source='given')
    with pytest.raises(SemmaeError, match='mine'):
        make_parts(splits() | dict(val=ImageSet(IMAGES['val'].flip(0))), source='mine', root=tmp_path)
    with pytest.raises(SemmaeError, match='yours'):
        make_parts(splits(), source='yours', root=tmp_path)


def test_maps_are_made_and_written_batch_by_batch(tmp_path):
    "All batches but the last have gone when one is asked for: memory does not grow with the images"
    alive = []
    def batches():
        for k in range(3):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            maps = torch.full((50, 4, 4), k)
            alive.append(weakref.ref(maps))
            yield maps
            del maps
    images = torch.zeros(150, 3, 8, 8, dtype=torch.uint8)
    write_maps(tmp_path, dict(train=batches()), dict(train=images))
    assert len(alive) == 3 and torch.equal(read_maps(tmp_path, 'train', images)[:, 0, 0],
                                           torch.arange(3).repeat_interleave(50).byte())


@pytest.mark.parametrize('source, options', [
    ('k_means', dict(n_parts=3)),
    ('two_level', dict(n_parts=3)),
    ('two_level', dict(n_parts=3, foreground='attention', share=.3)),
    ('heads', {})])
def test_a_source_says_the_same_of_an_image_in_any_batch(source, options):
    encoder = small_encoder()
    of = open_parts(source, encoder, IMAGES['train'], block=1, **options)
    whole = of.predict(IMAGES['test'])
    assert whole.shape == (4, 4, 4)
    apart = torch.cat([of.predict(x[None]) for x in IMAGES['test']])
    assert (whole == apart).float().mean() > .95, 'but for cells on an edge between two labels'
    again = open_parts(source, encoder, IMAGES['train'], block=1, **options).predict(IMAGES['test'])
    assert torch.equal(whole, again)


def test_half_written_maps_are_not_maps(tmp_path):
    def breaks():
        yield torch.zeros(2, 4, 4)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_maps(tmp_path, dict(val=breaks()), dict(val=IMAGES['val']))
    assert not list(tmp_path.iterdir())


# label 0 is the background
TRUTH = torch.stack([torch.tensor([[0, 0, 1, 1], [0, 2, 2, 1], [3, 2, 0, 0]]).roll(k, 1) for k in range(20)])
PAINTED = painted(TRUTH, noise=5)


@torch.no_grad()
def looking(scores):
    "An encoder of one block, and how much a head's class token looks at the parts 0 to 3 and at itself"
    vit = placeless_encoder((6, 8), depth=1)
    block, heads = vit.blocks[0], len(scores)
    columns = painted(torch.arange(4).expand(1, 3, 4), noise=0)
    x = torch.cat([vit.patch_embed(pixels_of(vit, columns))[0, :4], vit.cls_token[0]])
    block.attn.num_heads, block.attn.head_dim, block.attn.scale = heads, 32//heads, 1
    for p in block.attn.qkv.parameters():
        p.zero_()
    q, k = block.attn.qkv.bias.view(3, heads, -1)[0], block.attn.qkv.weight.view(3, heads, -1, 32)[1]
    q[:, 0] = 1
    k[:, 0] = torch.tensor(scores) @ torch.linalg.pinv(block.norm1(x)).mT
    return vit


def fitted(vit, source, images=PAINTED, **options):
    return open_parts(source, vit, images[:10], **options).predict(images)


@pytest.mark.parametrize('by', ['means', 'attention'])
def test_two_steps_find_the_foreground_and_then_its_parts(by):
    vit = looking([[0., 2., 2., 2., 0.]])
    maps = fitted(vit, 'two_level', n_parts=4, foreground=by, share=7/12)
    assert torch.equal(maps > 0, TRUTH > 0) and consistency(maps, TRUTH)['nmi'] == pytest.approx(1)
    assert consistency(fitted(vit, 'two_level', n_parts=4, foreground=by), TRUTH)['nmi'] > .9, (
        'the midpoint, or the mean, does here as well')


@pytest.mark.parametrize('by', ['means', 'attention'])
def test_each_step_looks_at_its_own_block(by):
    vit = small_encoder()
    maps = {(k, of): fitted(vit, 'two_level', IMAGES['train'], n_parts=3, foreground=by, share=.4, block=k,
                            foreground_block=of) for k in (1, 2) for of in (1, 2, None)}
    assert torch.equal(maps[1, 2] > 0, maps[2, 2] > 0) and not torch.equal(maps[1, 2], maps[2, 2])
    assert torch.equal(maps[1, None], maps[1, 2]), 'of the foreground, the last'
    assert not torch.equal(maps[1, 1] > 0, maps[1, 2] > 0)


@pytest.mark.parametrize('source, options', [
    ('k_means', dict(n_parts=4)), ('two_level', dict(n_parts=5, foreground='attention', share=.6))])
def test_parts_are_told_apart_by_what_their_block_says(source, options):
    vit = placeless_encoder((6, 8), 2)
    vit.blocks[1].mlp.fc2.weight.data *= 50  # the second says something else
    maps = fitted(vit, source, block=1, **options)
    there = maps > 0 if source == 'two_level' else maps >= 0
    assert normalized_mutual_info_score(TRUTH[there], maps[there]) == pytest.approx(1)


def test_the_share_is_the_share():
    for share in (.25, .5):
        maps = fitted(small_encoder(), 'two_level', IMAGES['train'], n_parts=3, foreground='attention',
                      share=share)
        assert (maps > 0).float().mean().item() == pytest.approx(share, abs=.06)


def test_a_head_is_the_one_that_looks_most_against_what_it_looks_at_on_average():
    vit = looking([[0., 0, 3, 0, 8], [3., 0, 0, 0, 0], [0., 0, 0, 3, 0], [0., 3, 0, 0, 0]])
    assert torch.equal(fitted(vit, 'heads'), torch.tensor([1, 3, 0, 2])[TRUTH]), (
        'head 0 looks at part 2, and most at the class token itself')


def test_a_grid_is_blocks_not_stripes():
    assert (open_parts('grid', n_parts=6, grid=(4, 6)).predict(IMAGES['val'])[0].tolist()
            == [[0, 0, 1, 1, 2, 2]]*2 + [[3, 3, 4, 4, 5, 5]]*2)


def test_what_a_source_is_fitted_on_are_some_training_images(tmp_path):
    seen = []
    try:
        @part_source('spy', sees=False)
        def spy(images, encoder, seed=0):
            seen.append(images[:, 0, 0, 0].tolist())
            return open_parts('grid', n_parts=2, grid=(1, 2))
        for n in (9, FIT + 9):
            images = torch.arange(n, dtype=torch.int32)[:, None, None, None]
            made = make_parts(dict(train=ImageSet(images), val=ImageSet(-images[:3])), 'spy', root=tmp_path)
            assert {k: len(m) for k, m in made.items()} == dict(train=n, val=3)
    finally:
        SOURCES.pop('spy', None)
    assert seen[0] == list(range(9)) and len(set(seen[1])) == FIT and min(seen[1]) >= 0


def test_keypoints_read_the_cell_under_them():
    maps = torch.arange(12).view(1, 3, 4).repeat(2, 1, 1)
    points = torch.tensor([[[.9, .1, 1], [.1, .9, 1], [.4, .4, 1]], [[.9, .1, 1], [.1, .9, 1], [.9, .9, 0]]])
    assert score_keypoints(maps, points)['nmi'] == pytest.approx(1), (
        'labels 3, 8 and 5, the same point the same label')
    twice = points.clone()
    twice[1, 0] = torch.tensor([.1, .9, 1])  # now two names under one label
    assert .2 < score_keypoints(maps, twice)['nmi'] < .9


def test_cub_keypoints_follow_the_crop(tmp_path):
    "Images are decoded from the middle: a point there keeps its pixel, one that is cut off is not seen"
    for sub in ('CUB/images/001.Auk', 'CUB/parts'):
        (tmp_path/sub).mkdir(parents=True)
    img = Image.new('RGB', (100, 50))
    for x, y in ((60, 10), (30, 40)):
        img.putpixel((x, y), (255, 0, 0))
    img.save(tmp_path/'CUB/images/001.Auk/a.png')
    (tmp_path/'CUB/images.txt').write_text('7 001.Auk/a.png\n')
    (tmp_path/'CUB/parts/part_locs.txt').write_text('7 1 60.5 10.5 1\n7 2 30.5 40.5 1\n7 3 99.0 25.0 1\n')
    square, wide = (read_cub(tmp_path/'CUB', ['train/001.Auk/a.png'], size)[0]
                    for size in ((50, 50), (25, 50)))
    decoded = np.asarray(ImageOps.fit(img, (50, 50)))[..., 0]
    for x, y, seen in square[:2].tolist():
        assert seen and decoded[int(y*50), int(x*50)] == 255
    assert square[2].tolist() == [0, 0, 0]
    assert torch.allclose(wide[2], torch.tensor([.99, .5, 1])), 'the whole width is there'


def test_the_control_never_pairs_an_image_with_itself():
    for n in range(2, 9):
        own = maps(n, n, grid=(40, 40))
        assert score_parts(own, own)['fg_nmi'] == pytest.approx(1) and control(own, own)['fg_nmi'] < .02


def test_labels_that_hold_nothing_are_shown():
    true = maps(8)
    assert len(score_parts(torch.zeros_like(true), true, n_parts=4)['consistency']['share']) == 4
    with pytest.raises(SemmaeError, match='n_parts'):
        score_parts(maps(9), true, n_parts=3)
    with pytest.raises(SemmaeError, match='true parts'):
        score_parts(true, torch.zeros_like(true))


def test_nearest_regions_are_of_other_images_and_of_any_label():
    vit = placeless_encoder((6, 8), 1)
    images, labels = closest(regions(vit, PAINTED, TRUTH), 4, 2, k=19)
    assert (labels == 2).all() and sorted(images.tolist()) == [k for k in range(20) if k != 4]
    mixed = TRUTH.clone()
    # in image 7 two labels are swapped
    mixed[7] = torch.where(mixed[7] == 2, 3, torch.where(mixed[7] == 3, 2, mixed[7]))
    images, labels = closest(regions(vit, PAINTED, mixed), 4, 2, k=19)
    assert labels[images == 7].tolist() == [3]


def test_the_truth_is_brought_to_the_maps_where_it_is():
    "On whatever device: with tensors that have none of their own"
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        assert resized_parts(torch.zeros(3, 8, 8, dtype=torch.uint8, device='cuda'),
                           (4, 4), 5).device.type == 'cuda'


def test_simpler_sources_stand_beside_learned_maps(tmp_path):
    data = dict(source=str(ROOT/'data'), size=[64, 64], channels=3, limit=20)
    splits = dict(zip(('train', 'val', 'test'), load_images(**data)))
    write_maps(tmp_path/'runs/parts', {k: d.parts for k, d in splits.items()},
               {k: d.images for k, d in splits.items()})
    save_encoder(small_encoder(image=(64, 64)), tmp_path/'runs/teacher/encoder.safetensors')
    images, maps = few_maps(tmp_path, dict(data=data, seed=0,
                                           parts=dict(source='learned', n_parts=3, block=1)))
    names = ['true parts', 'learned', 'Ward', 'k-means in the image', 'place', 'heads', 'k-means']
    assert (list(maps) == names
            and {len(m) for m in maps.values()} == {len(images)} == {20})
    assert torch.equal(maps['learned'], maps['true parts']) and maps['k-means'].shape == (20, 8, 8)
    assert (list(few_maps(tmp_path, dict(data=data, seed=0, parts=dict(source='grid', n_parts=4)))[1])
            == ['true parts', 'grid']), 'a grid looks through nothing'


def test_the_hardest_images_are_those_whose_maps_overlap_least():
    true = torch.tensor([[0, 0], [1, 2]]).repeat(4, 1, 1)
    maps = torch.stack([true[0], true[0]*0, torch.tensor([[0, 1], [1, 1]]), true[0]])
    true[3] = 0  # nothing to overlap with
    assert hardest(maps, true)[:2].tolist() == [1, 2]


def test_what_is_called_foreground_is_judged_as_such():
    true = torch.tensor([[[0, 1], [2, 0]], [[0, 1], [0, 0]]])
    found = torch.tensor([[[0, 3], [0, 1]], [[0, 1], [0, 0]]])
    assert called_iou(found, true).tolist() == pytest.approx([1/3, 1])
    assert (judge_parts(true, true, 3, with_background=True)['called_iou'] == 1
            and 'called_iou' not in judge_parts(true, true, 3))


def test_what_users_may_get_wrong_is_named(tmp_path):
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(SemmaeError, match='keypoint'):
        score_keypoints(maps(0, n=4), torch.rand(4, 5, 2))
    with pytest.raises(SemmaeError, match='keypoint'):
        score_keypoints(maps(0, n=1), torch.full((1, 5, 3), 60.))
    with pytest.raises(SemmaeError, match='7'):
        closest(torch.ones(3, 2, 4), 7, 0)
    for wrong in (np.full((4, 2, 2), np.inf), np.full((4, 2, 2), 'cat'), np.full((4, 2, 2), None)):
        with pytest.raises(SemmaeError, match='test'):
            write_maps(tmp_path, dict(test=wrong), dict(test=images))
    write_maps(tmp_path, dict(test=np.arange(16, dtype=np.uint16).reshape(4, 2, 2)), dict(test=images))
    assert torch.equal(read_maps(tmp_path, 'test', images).flatten().long(), torch.arange(16))


def test_images_smaller_than_a_patch():
    with pytest.raises(SemmaeError, match='data.size'):
        fitted(small_encoder(), 'heads', torch.zeros(6, 3, 4, 4, dtype=torch.uint8))


def test_an_image_whose_parts_are_smaller_than_a_cell_is_no_failure():
    true, maps = torch.zeros(2, 32, 32, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    true[0, :2, :2] = true[1, :16] = maps[1, :, :4] = 1
    assert hardest(maps, true).tolist() == [1, 0]
