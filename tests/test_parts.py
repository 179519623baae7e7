"Scores of part maps against brute force, sources against what must not matter, files against tampering."
import gc
import weakref
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from semmae.core import SemmaeError, generator
from semmae.images import ImageSet, read_maps, resized_parts, write_maps
from semmae.parts import foreground_iou, matching, open_parts, read_cub, score_keypoints, score_parts
from semmae.pipeline.guide import make_parts
from semmae.pipeline.parts import called_iou, closest, control, hardest, judge_parts, regions
from semmae.pipeline.report import few_maps
from semmae.sources import load_images
from semmae.vit import BlockOutput, make_encoder, save_encoder

ROOT = Path(__file__).parent.parent


def maps(seed, n=6, labels=5, grid=(6, 7)):
    return torch.randint(0, labels, (n, *grid), generator=generator('maps', seed, labels))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 5))
def test_scores_are_sklearns_on_the_cells_and_do_not_know_names(seed, n_pred, n_true):
    pred, true = maps(seed, labels=n_pred), maps(seed + 1, labels=n_true)
    s, fg = score_parts(pred, true), (true != 0).flatten()
    p, t = pred.flatten(), true.flatten()
    assert (s['nmi'] == pytest.approx(normalized_mutual_info_score(t, p))
            and s['fg_ari'] == pytest.approx(adjusted_rand_score(t[fg], p[fg])))
    other = score_parts(torch.randperm(n_pred, generator=generator(seed))[pred], true)
    for k in ('fg_nmi', 'fg_ari', 'nmi', 'ari', 'fg_iou'):
        assert s[k] == pytest.approx(other[k])
    assert sorted(s['share']) == pytest.approx(sorted(other['share'])) and sum(s['share']) == pytest.approx(1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_the_matching_is_the_best_of_all(seed):
    table = np.random.default_rng(seed).integers(0, 20, (4, 4))
    iou = table/np.maximum(table.sum(1, keepdims=True) + table.sum(0) - table, 1)
    assert matching(table)[2].sum() == pytest.approx(max(sum(iou[i, p[i]] for i in range(4))
                                                         for p in permutations(range(4))))


def test_truth_of_other_images_takes_the_score_away():
    true = maps(3, n=40, grid=(12, 12))
    assert score_parts(true, true)['nmi'] == pytest.approx(1) and control(true, true)['nmi'] < .05
    place = torch.arange(144).view(1, 12, 12).expand(40, -1, -1)//36  # what is position alone stays
    assert control(place, place)['nmi'] == pytest.approx(1)


def test_true_parts_are_read_by_majority():
    fine = maps(5, grid=(4, 4)).repeat_interleave(5, 1).repeat_interleave(5, 2)
    speckled = fine.clone()
    speckled[:, ::5, ::5] = 4
    assert score_parts(maps(5, grid=(4, 4)), speckled)['nmi'] == pytest.approx(1)


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
    with pytest.raises(SemmaeError, match='come without part maps'):
        make_parts(splits(), source='given')
    with pytest.raises(SemmaeError, match='made for other images'):
        make_parts(splits() | dict(val=ImageSet(IMAGES['val'].flip(0))), source='mine', root=tmp_path)
    with pytest.raises(SemmaeError, match='there is no source of parts .yours.'):
        make_parts(splits(), source='yours', root=tmp_path)


def test_maps_are_made_and_written_batch_by_batch(tmp_path):
    "All batches but the last have gone when one is asked for: memory does not grow with the images"
    alive = []
    def batches():
        for k in range(6):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            maps = torch.full((50, 4, 4), k)
            alive.append(weakref.ref(maps))
            yield maps
            del maps
    images = torch.zeros(300, 3, 8, 8, dtype=torch.uint8)
    write_maps(tmp_path, dict(train=batches()), dict(train=images))
    assert len(alive) == 6 and torch.equal(read_maps(tmp_path, 'train', images)[:, 0, 0],
                                           torch.arange(6).repeat_interleave(50).byte())


@pytest.mark.parametrize('source, options', [
    ('k_means', dict(n_parts=3)),
    ('two_level', dict(n_parts=3)),
    ('two_level', dict(n_parts=3, foreground='attention', share=.3)),
    ('heads', {})])
def test_a_source_says_the_same_of_an_image_in_any_batch(source, options):
    encoder = make_encoder(image=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2)
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


class Stub:
    "In place of an encoder: block 1 tells four parts apart, the last block foreground from background"
    # (20,3,4): label 0 is background
    truth = torch.tensor([[[0, 0, 1, 1], [0, 2, 2, 1], [3, 2, 0, 0]]]).repeat(20, 1, 1)
    for k in range(20):
        truth[k] = truth[k].roll(k % 4, 1)

    def seen(images, blocks):
        ids, axes = images[:, 0, 0, 0].long(), torch.eye(6)
        noise = torch.randn(20, 3, 4, 6, generator=generator('noise'))[ids]*.05
        parts, front = Stub.truth[ids], (Stub.truth[ids] > 0)
        whole = torch.zeros(len(ids), 6)
        there = BlockOutput(whole, axes[parts] + noise,
                     torch.stack([(parts == k).float() + .1 for k in (2, 0, 3, 1)], 1))
        last = BlockOutput(whole, axes[4 + front.long()] + noise,
                    front[:, None]*2. + torch.rand(len(ids), 3, 3, 4, generator=generator('look')))
        return [there if block == 1 else last for block in blocks]


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr('semmae.parts.block_outputs', lambda vit, images, blocks: Stub.seen(images, blocks))
    return torch.arange(20)[:, None, None, None].expand(20, 3, 8, 8).to(torch.uint8)


def fitted(stub, source, **options):
    return open_parts(source, torch.nn.Module(), stub[:10], **dict(block=1) | options).predict(stub)


def agree(maps):
    return score_parts(maps, Stub.truth)


@pytest.mark.parametrize('by', ['means', 'attention'])
def test_two_steps_find_the_foreground_at_the_last_block_and_the_parts_at_theirs(stub, by):
    maps = fitted(stub, 'two_level', n_parts=4, foreground=by, share=7/12)
    assert torch.equal(maps > 0, Stub.truth > 0), 'label 0 is the background'
    assert agree(maps)['nmi'] == pytest.approx(1)
    assert agree(fitted(stub, 'two_level', n_parts=4, foreground=by))['nmi'] > .9, (
        'the midpoint, or the mean, does here as well')
    assert torch.equal(fitted(stub, 'two_level', n_parts=4, foreground=by, share=7/12, foreground_block=2),
                       maps)
    assert not torch.equal(
        fitted(stub, 'two_level', n_parts=4, foreground=by, share=7/12, foreground_block=1) > 0,
        Stub.truth > 0), 'block 1 does not know the foreground'
    other = fitted(stub, 'two_level', n_parts=4, foreground=by, share=7/12, block=2)
    assert torch.equal(other > 0, Stub.truth > 0) and agree(other)['fg_nmi'] < .3, (
        'block 2 is the last and does not know the parts')


def test_the_share_is_the_share(stub):
    for share in (.25, .5):
        assert ((fitted(stub, 'two_level', n_parts=3, foreground='attention', share=share) > 0)
                .float().mean().item() == pytest.approx(share, abs=.06))


def test_k_means_finds_what_its_block_tells_apart(stub):
    assert agree(fitted(stub, 'k_means', n_parts=4))['nmi'] == pytest.approx(1)
    assert agree(fitted(stub, 'k_means', n_parts=2, block=2))['fg_iou'] == pytest.approx(1)


def test_a_head_is_the_one_that_looks_most(stub):
    assert torch.equal(fitted(stub, 'heads'), torch.tensor([1, 3, 0, 2])[Stub.truth]), (
        'head 0 looks at part 2, head 1 at the background …')


def loud(images, blocks, k=30.):
    "The same, but head 0 looks at everything `k` times as hard and some tokens are `k` times as long"
    seen = Stub.seen(images, blocks)
    much = torch.rand(seen[0].patches.shape[:3], generator=generator('loud'))[..., None]*k + 1
    hard = torch.tensor([k, 1, 1, 1])[:, None, None]
    return [s._replace(attention=s.attention*hard if block == 1 else s.attention, patches=s.patches*much)
            for s, block in zip(seen, blocks)]


def test_directions_count_and_not_how_loud_they_are(stub, monkeypatch):
    heads = fitted(stub, 'heads')
    monkeypatch.setattr('semmae.parts.block_outputs', lambda vit, images, blocks: loud(images, blocks))
    assert torch.equal(fitted(stub, 'heads'), heads), 'a head is compared with what it looks at on average'
    assert agree(fitted(stub, 'k_means', n_parts=4))['nmi'] == pytest.approx(1)
    assert torch.equal(fitted(stub, 'two_level', n_parts=4, share=7/12) > 0, Stub.truth > 0)


def test_maps_are_predicted_when_they_are_asked_for(stub, monkeypatch):
    looked = []
    monkeypatch.setattr('semmae.parts.block_outputs', lambda vit, images, blocks:
                        looked.append(len(images)) or Stub.seen(images, blocks))
    images = ImageSet(stub)
    maps = make_parts(dict(train=images, test=images), 'k_means', torch.nn.Module(), n_parts=4, block=1)
    before = len(looked)
    next(iter(maps['test']))
    assert len(looked) == before + 1, 'nothing before, one batch then'


def test_a_grid_is_blocks_not_stripes():
    assert (open_parts('grid', n_parts=6, grid=(4, 6)).predict(IMAGES['val'])[0].tolist()
            == [[0, 0, 1, 1, 2, 2]]*2 + [[3, 3, 4, 4, 5, 5]]*2)


def test_what_a_source_is_fitted_on_are_training_images(monkeypatch):
    seen = []
    monkeypatch.setattr('semmae.pipeline.guide.open_parts', lambda source, encoder, images, seed, **options:
                        seen.append(images) or open_parts('grid', n_parts=2))
    made = make_parts(splits(), source='k_means', encoder=torch.nn.Module(), n_parts=2)
    assert ({tuple(x.flatten().tolist()) for x in seen[0]}
            == {tuple(x.flatten().tolist()) for x in IMAGES['train']})
    assert {k: len(torch.cat(list(m))) for k, m in made.items()} == {k: len(x) for k, x in IMAGES.items()}


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
        own = torch.arange(n).view(n, 1, 1).expand(n, 2, 2) + 1
        assert (control(own, own)['fg_iou'] == pytest.approx(1)
                and score_parts(own, own)['nmi'] == pytest.approx(1))
        with pytest.MonkeyPatch.context() as m:
            m.setattr('semmae.pipeline.parts.score_parts',
                      lambda pred, true, **kw: (pred[:, 0, 0] == true[:, 0, 0]).any())
            assert not control(own, own)


def test_labels_that_hold_nothing_are_shown():
    true = maps(8)
    assert len(score_parts(torch.zeros_like(true), true, n_parts=4)['share']) == 4
    with pytest.raises(SemmaeError, match='labels from 0 to 4, and 3 parts'):
        score_parts(maps(9), true, n_parts=3)
    with pytest.raises(SemmaeError, match='the background: give images with a foreground'):
        score_parts(true, torch.zeros_like(true))


def test_nearest_regions_are_of_other_images_and_of_any_label(stub):
    monkey = regions(torch.nn.Module(), stub, Stub.truth, block=1)
    images, labels = closest(monkey, 4, 2, k=19)
    assert (labels == 2).all() and sorted(images.tolist()) == [k for k in range(20) if k != 4]
    mixed = Stub.truth.clone()
    # in image 7 two labels are swapped
    mixed[7] = torch.where(mixed[7] == 2, 3, torch.where(mixed[7] == 3, 2, mixed[7]))
    images, labels = closest(regions(torch.nn.Module(), stub, mixed, block=1), 4, 2, k=19)
    assert labels[images == 7].tolist() == [3]


def test_the_truth_is_brought_to_the_maps_where_it_is():
    "On whatever device: with tensors that have none of their own"
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        assert resized_parts(torch.zeros(3, 8, 8, dtype=torch.uint8, device='cuda'),
                           (4, 4), 5).device.type == 'cuda'


def test_heads_and_k_means_stand_beside_learned_maps(tmp_path):
    data = dict(source=str(ROOT/'data'), size=[64, 64], channels=3, limit=20)
    splits = dict(zip(('train', 'val', 'test'), load_images(**data)))
    write_maps(tmp_path/'runs/parts', {k: d.parts for k, d in splits.items()},
               {k: d.images for k, d in splits.items()})
    save_encoder(make_encoder(image=(64, 64), patch_size=8, embed_dim=32, depth=2, num_heads=2),
                 tmp_path/'runs/teacher/encoder.safetensors')
    images, maps = few_maps(tmp_path, dict(data=data, seed=0,
                                           parts=dict(source='learned', n_parts=3, block=1)))
    assert (list(maps) == ['true parts', 'heads', 'k_means', 'learned']
            and {len(m) for m in maps.values()} == {len(images)} == {20})
    assert torch.equal(maps['learned'], maps['true parts']) and maps['k_means'].shape == (20, 8, 8)
    assert (list(few_maps(tmp_path, dict(data=data, seed=0, parts=dict(source='grid', n_parts=4)))[1])
            == ['true parts', 'grid']), 'a grid looks through nothing'


def test_the_hardest_images_are_those_whose_maps_tell_nothing():
    true = torch.tensor([[0, 0], [1, 2]]).repeat(3, 1, 1)
    maps = torch.stack([true[0], torch.zeros(2, 2, dtype=torch.long), torch.tensor([[0, 1], [1, 1]])])
    assert hardest(maps, true).tolist() == [1, 2, 0]
    true[1] = 1  # one part alone: nothing to tell
    assert hardest(maps, true)[0] == 2


def test_what_is_called_foreground_is_judged_as_such():
    true = torch.tensor([[[0, 1], [2, 0]]])
    assert called_iou(torch.tensor([[[0, 3], [0, 1]]]), true) == pytest.approx(1/3)
    two = true.repeat(2, 1, 1)
    assert (judge_parts(two, two, 3, with_background=True)['called_iou'] == 1
            and 'called_iou' not in judge_parts(two, two, 3))


def test_what_users_may_get_wrong_is_one_sentence(tmp_path):
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(SemmaeError, match='give keypoints'):
        score_keypoints(maps(0, n=4), torch.rand(4, 5, 2))
    with pytest.raises(SemmaeError, match='fractions of them'):
        score_keypoints(maps(0, n=1), torch.full((1, 5, 3), 60.))
    with pytest.raises(SemmaeError, match='image 7 has no part 0'):
        closest(torch.ones(3, 2, 4), 7, 0)
    for wrong in (np.full((4, 2, 2), np.inf), np.full((4, 2, 2), 'cat'), np.full((4, 2, 2), None)):
        with pytest.raises(SemmaeError, match='the maps of test'):
            write_maps(tmp_path, dict(test=wrong), dict(test=images))
    write_maps(tmp_path, dict(test=np.arange(16, dtype=np.uint16).reshape(4, 2, 2)), dict(test=images))
    assert torch.equal(read_maps(tmp_path, 'test', images).flatten().long(), torch.arange(16))


@pytest.mark.parametrize('source, options', [('heads', {}), ('k_means', dict(n_parts=2)),
                                             ('learned', dict(n_parts=2)), ('paper', dict(n_parts=2))])
def test_images_smaller_than_a_patch(source, options):
    encoder = make_encoder(image=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(SemmaeError, match='`data.size`'):
        open_parts(source, encoder, torch.zeros(6, 3, 4, 4, dtype=torch.uint8),
                   **options).predict(torch.zeros(6, 3, 4, 4, dtype=torch.uint8))


def test_the_parameter_that_names_a_wrong_block_is_named():
    encoder = make_encoder(image=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(SemmaeError, match='`parts.block`, `parts.blocks` and `parts.foreground_block`'):
        open_parts('two_level', encoder, torch.zeros(6, 3, 32, 32, dtype=torch.uint8), n_parts=2,
                   foreground_block=9)


def test_an_image_whose_parts_are_smaller_than_a_cell_is_no_failure():
    true, maps = torch.zeros(2, 32, 32, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    true[0, :2, :2] = true[1, :16] = maps[1, :, :4] = 1
    assert hardest(maps, true).tolist() == [1, 0]
