"How parts are found against brute force and scikit-learn, planted parts, files against mistakes."
import numpy as np
import pytest
import torch
from conftest import ROOT, TRUTH, painted, placeless_encoder, small_encoder
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.ndimage import label as pieces
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.linear_model import Ridge
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from semmae.core import SemmaeError, generator
from semmae.demo.sheets import demo_images
from semmae.images import ImageSet
from semmae.learn import (ENOUGH, cluster_parts, connected_clusters, cut, describe, each_image,
                          foreground_score, learn_parts, load_learned, ridge, spread, telling_directions)
from semmae.paper import PartTokens, StyleDecoder, alike, standard_tokens, learn_paper_parts
from semmae.parts import batched_outputs, score_parts
from semmae.pipeline.maps import make_parts
from semmae.pipeline.parts import called_iou
from semmae.sources import load_images
from semmae.weights import open_encoder


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator('draw', seed))


def test_cells_are_described_by_tokens_place_and_colour():
    images = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    images[0, 1, :4, :4] = 255
    x = describe(images, F.normalize(draw(2, 2, 3, 4, 5), dim=4), place=3, colour=7)
    assert x.shape == (2, 2, 3, 4*5 + 2 + 3)
    assert torch.allclose(x[..., :20].norm(dim=3), torch.ones(2, 2, 3)), 'many blocks count as one'
    assert torch.equal(x[1, 1, 2, 20:], torch.tensor([3*1/2, 3*2/3, 0, 0, 0]))
    assert x[0, 0, 0, 22:].tolist() == [0, 7, 0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_spreading_is_the_sum_of_all_steps(seed):
    values, cells = draw(2, 3, 4, 2, seed=seed).double(), draw(2, 3, 4, 5, seed=seed + 1).double()/3
    for b in range(2):
        flat = cells[b].flatten(0, 1)
        near = torch.stack([torch.stack([(-(p - q).square().sum()/.5).exp() for q in flat]) for p in flat])
        step, out, now = near/near.sum(1, keepdim=True), 0, values[b].flatten(0, 1)
        for k in range(300):
            out, now = out + .15*.85**k*now, step @ now
        assert torch.allclose(spread(values, cells)[b].flatten(0, 1), out)


def test_what_spreads_stays_in_its_image_and_what_is_constant_stays():
    values, cells = draw(3, 4, 4, 1), draw(3, 4, 4, 5)
    changed = values.clone()
    changed[1] = 9
    one, other = spread(values, cells), spread(changed, cells)
    assert torch.allclose(one[[0, 2]], other[[0, 2]]) and torch.allclose(other[1], torch.tensor(9.))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_the_direction_is_scikit_learns(seed):
    x, y = draw(4, 3, 3, 6, seed=seed).double(), draw(4, 3, 3, seed=seed + 1).double()
    flat = x.flatten(0, 2)
    penalty = .01*flat.var(0, correction=0).mean().item()*len(flat)
    peer = Ridge(penalty).fit(flat.numpy(), y.flatten().numpy())
    assert np.allclose(ridge(x, y).numpy(), peer.coef_)


def test_scores_are_measured_against_the_border_of_their_image():
    t, cells = F.normalize(draw(3, 6, 6, 2, 4), dim=4), draw(3, 6, 6, 5)
    direction = draw(8)
    score = foreground_score(direction, t, cells)
    edge = torch.ones(6, 6, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert torch.allclose(score[:, edge].mean(1), torch.zeros(3), atol=1e-4)
    assert torch.allclose(score.flatten(1).quantile(.9, 1), torch.ones(3), atol=1e-4)
    assert torch.allclose(foreground_score(7*direction, t, cells), score, atol=1e-4), 'no scale of its own'


def test_what_differs_between_images_does_not_tell_parts_apart():
    x, maps = draw(20, 4, 4, 6), torch.randint(0, 4, (20, 4, 4), generator=generator(1))
    apart = x + 9*draw(20, 1, 1, 6, seed=2)
    maps[3] = 0  # an image without a foreground
    outer = lambda x: (telling := telling_directions(x, maps, 3)) @ telling.mT  # whatever their signs
    assert torch.allclose(outer(x), outer(apart), rtol=.02, atol=1e-3)
    moved = torch.where(maps[..., None] == 0, 5., x)
    assert torch.allclose(outer(x), outer(moved), rtol=.02, atol=1e-3), 'what is no part does not count'


def in_image(cluster, x, front, *args):
    "The map of a single image"
    return each_image(cluster, torch.tensor(x)[None], torch.tensor(front)[None], *args)[0].numpy()


def same_cells(one, other):
    return adjusted_rand_score(np.ravel(one), np.ravel(other)) == pytest.approx(1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_clusters_are_scikit_learns_and_count_from_the_top(seed, n):
    x, front = draw(6, 7, 3, seed=seed).numpy(), draw(6, 7, seed=seed + 1).numpy() > -.5
    found = in_image(cut, x, front, n, n)
    assert (found > 0).tolist() == front.tolist() and found.max() == n
    assert same_cells(found[front], AgglomerativeClustering(n).fit(x[front]).labels_)
    heights = [np.nonzero(found == k)[0].mean() for k in range(1, n + 1)]
    assert heights == sorted(heights)


def test_an_image_has_as_many_parts_as_leave_none_with_most_of_it():
    x, front = np.zeros((4, 10, 1)), np.ones((4, 10), bool)
    x[0, 0], x[0, 1] = 100, 50       # two odd cells, then two halves
    x[2:] = 1
    assert [cut(x, front, least, 6).max() + 1 for least in (1, 2, 3, 4, 5)] == [4, 4, 4, 4, 4], (
        'and no more than differ')
    assert cut(x, front, 1, 3).max() == 2 and cut(x, front, 1, 1).max() == 0
    few = np.zeros((4, 10), bool)
    assert in_image(cut, x, few, 2, 6).max() == 0
    few[1, 1] = True
    assert in_image(cut, x, few, 2, 6).sum() == 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_connected_clusters_are_in_one_piece(seed, n):
    found = in_image(connected_clusters, draw(6, 7, 3, seed=seed).numpy(), np.ones((6, 7), bool), n)
    assert np.unique(found).tolist() == [*range(1, n + 1)]
    assert all(pieces(found == k)[1] == 1 for k in range(1, n + 1))


def test_planted_parts_are_found_and_so_is_what_they_lie_in(planted):
    encoder, images = planted
    maps = learn_parts(images[:30], encoder, n_parts=6, share=.3).predict(images[30:])
    scores = score_parts(maps, TRUTH[30:])
    assert scores['fg_nmi'] > .9 and scores['mbo'] > .9 and called_iou(maps, TRUTH[30:]).mean() > .9


def test_the_image_decides_how_much_of_it_is_foreground():
    truth = torch.zeros(40, 8, 8, dtype=torch.long)
    truth[:20, 3:6, 3:6] = 1
    truth[20:, 1:7, 1:7] = 1
    share = (truth > 0).float().mean().item()
    encoder, images = placeless_encoder((16, 16), depth=1), painted(truth)
    maps = learn_parts(images, encoder, share=share).predict(images)
    small, large = called_iou(maps, truth).unflatten(0, (2, 20)).mean(1)
    assert small > .8 and large > .8


def test_two_parts_are_foreground_and_background(planted):
    encoder, images = planted
    maps = learn_parts(images[:30], encoder, n_parts=2, share=.3).predict(images[30:])
    assert ((maps == 1) == (TRUTH[30:] > 0)).float().mean() > .95 and maps.max() == 1


def test_drawings_are_cut_by_all_that_a_cell_is_described_by():
    "Without spreading, or by tokens alone, the scores are two to four points lower"
    teacher = open_encoder(weights=ROOT/'data/teacher.safetensors')
    train, val = demo_images('train', 300).images, demo_images('val', 400)
    ways = dict(learned=learn_parts(train, teacher), ward=cluster_parts(train, teacher),
                k_means=cluster_parts(train, teacher, n_parts=4, by='k_means'))
    scores = {k: score_parts(parts.predict(val.images), val.parts) for k, parts in ways.items()}
    assert scores['learned']['fg_ari'] > .29 and scores['learned']['mbo'] > .48
    assert scores['ward']['fg_ari'] > .265 and scores['k_means']['fg_ari'] > .265


@pytest.mark.parametrize('by', ['place', 'k_means', 'ward'])
def test_other_cuts_are_of_the_same_foreground(planted, by):
    encoder, images = planted
    one = learn_parts(images[:30], encoder, n_parts=4, share=.3).predict(images[30:])
    other = cluster_parts(images[:30], encoder, 4, by, share=.3).predict(images[30:])
    assert torch.equal(one > 0, other > 0) and other.max() == 3
    score = score_parts(other, TRUTH[30:])['fg_nmi']
    assert score > .9 if by != 'place' else score < .9


def test_place_alone_cuts_by_nothing_else(planted):
    encoder, images = planted
    for labels in cluster_parts(images[:30], encoder, 4, 'place', share=.3).predict(images[30:]):
        cells, own = (labels > 0).nonzero()/8, labels[labels > 0]
        peer = KMeans(3, n_init=4, random_state=0).fit(cells.numpy())
        spread_of = sum((cells[own == k] - cells[own == k].mean(0)).square().sum().item() for k in (1, 2, 3))
        assert spread_of == pytest.approx(peer.inertia_, rel=.02)  # cuts that are as good may differ


def test_a_stream_teaches_what_its_images_do(tmp_path):
    "Through an encoder, to the bit"
    for k in range(12):
        Image.fromarray(torch.randint(256, (16, 16, 3), generator=generator(k),
                                      dtype=torch.uint8).numpy()).save(tmp_path/f'{k}.png')
    encoder = small_encoder(image=(16, 16), patch_size=4)
    images, stream = (load_images(tmp_path, ['train'], size=(16, 16), stream=s)[0].images
                      for s in (False, True))
    one, other = (learn_parts(x, encoder, n_parts=3) for x in (images, stream))
    assert (all(torch.equal(one.state[k], other.state[k]) for k in one.state)
            and torch.equal(one.predict(images), other.predict(images)))


def test_the_seed_draws_the_images_that_are_learned_from(planted):
    encoder, images = planted
    many = images.repeat(ENOUGH//len(images) + 1, 1, 1, 1)
    one, again, other = (learn_parts(many, encoder, n_parts=4, share=.3, seed=s).state for s in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one['direction'], other['direction'])


def test_an_image_is_labelled_alike_in_whatever_company(planted):
    encoder, images = planted
    parts = learn_parts(images[:30], encoder, n_parts=4, share=.3)
    alone = torch.cat([parts.predict(images[k:k + 1]) for k in range(10)])
    assert torch.equal(alone, parts.predict(images[:10]))


def test_learned_parts_come_back_from_their_file_and_from_no_other(planted, tmp_path):
    encoder, images = placeless_encoder((16, 16), depth=4), planted[1]
    parts = learn_parts(images, encoder, n_parts=4, share=.3)
    parts.save(tmp_path/'parts.safetensors')
    back = load_learned(tmp_path/'parts.safetensors', encoder)
    assert (back.blocks, back.n_parts) == ([2, 3, 4], 4)
    assert torch.equal(back.predict(images), parts.predict(images))
    (tmp_path/'broken.safetensors').write_bytes((tmp_path/'parts.safetensors').read_bytes()[:-9])
    for file, vit in (('broken', encoder), ('none', encoder), ('parts', small_encoder())):
        with pytest.raises(SemmaeError, match=f'{file}.safetensors'):
            load_learned(tmp_path/f'{file}.safetensors', vit)


def test_a_profile_may_ask_for_them(planted, tmp_path):
    encoder, images = planted
    splits = dict(train=ImageSet(images), test=ImageSet(images[:8]))
    for source in (dict(source='learned'), dict(source='clusters', by='place')):
        maps = make_parts(splits, encoder=encoder, root=tmp_path, n_parts=4, share=.3, block=2, **source)
        assert maps['test'].shape == (8, 8, 8)
        with pytest.raises(SemmaeError, match='parts.n_parts'):
            make_parts(splits, encoder=encoder, root=tmp_path, n_parts=65, **source)


def test_weights_that_are_not_finite_are_named(planted):
    encoder, images = planted
    with torch.no_grad():
        encoder.norm.weight.fill_(float('nan'))
    with pytest.raises(SemmaeError, match='teacher.weights'):
        learn_parts(images, encoder)


# the paper's way

def test_a_map_is_where_its_token_is_like_the_cell():
    maps = PartTokens(6, 3)
    whole, patches = (torch.randn(2, 6, generator=generator(0)),
                      torch.randn(2, 4, 5, 6, generator=generator(1)))
    tokens = maps.embed(whole)
    for b, n in ((0, 0), (1, 2)):
        look = torch.stack([10*torch.cosine_similarity(tokens[b, n], patches[b, y, x], dim=0)
                            for y in range(4) for x in range(5)]).softmax(0).view(4, 5)
        for y, x in ((2, 3), (1, 1)):  # away from the border: the mean of nine cells
            assert torch.allclose(maps(whole, patches)[b, n, y, x],
                                  20*look[y-1:y+2, x-1:x+2].mean(), atol=1e-5)


def test_the_decoder_knows_places_from_maps_alone_and_colours_from_the_style():
    decoder, maps, style = (StyleDecoder(3, 6, 3, 2), torch.rand(2, 3, 8, 8, generator=generator(0)),
                            torch.randn(2, 6, generator=generator(1)))
    out = decoder(maps, style)
    assert out.shape == (2, 3, 32, 32)
    assert (not torch.allclose(out, decoder(maps, style.flip(0)), atol=1e-3)
            and not torch.allclose(out, decoder(maps.flip(0), style), atol=1e-3))
    assert torch.allclose(decoder(5*maps, style), out, atol=.15*out.std().item()), (
        'AdaIN: how strong a map is does not matter, where it is strong does')


def test_maps_are_alike_as_cosines_say():
    maps = torch.rand(2, 3, 4, 4, generator=generator(0))
    pairs = [torch.cosine_similarity(m[i].flatten(), m[j].flatten(), dim=0)
             for m in maps for i in range(3) for j in range(3) if i != j]
    assert alike(maps).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_the_papers_way_keeps_maps_apart_and_rebuilds_an_image_from_its_own(planted):
    encoder, images = planted
    apart, own, others = [], [], []
    for steps in (1, 60):
        # one part is too small to outlive the blur
        parts = learn_paper_parts(images[:30], encoder, n_parts=3, steps=steps)
        with torch.no_grad():
            whole, patches = standard_tokens(*next(batched_outputs(encoder, images[30:], [None])))
            maps = parts.maps(whole, patches)
            true = F.interpolate(images[30:].float()/127.5 - 1, parts.decoder(maps, whole).shape[2:],
                                 mode='area')
            apart.append(alike(maps).item())
            own.append(F.mse_loss(parts.decoder(maps, whole), true).item())
            others.append(F.mse_loss(parts.decoder(maps.roll(1, 0), whole), true).item())
    assert apart[1] < .7*apart[0] and own[1] < .2*own[0] and own[1] < .7*others[1], (apart, own, others)


def test_the_papers_way_by_value_and_its_collapse(planted, tmp_path):
    encoder, images = planted
    options = dict(n_parts=3, steps=10)
    one, again, other = (learn_paper_parts(images, encoder, **options, seed=s).maps.state_dict()
                         for s in (0, 0, 1))
    assert (all(torch.equal(one[k], again[k]) for k in one)
            and not all(torch.equal(one[k], other[k]) for k in one))
    splits = dict(train=ImageSet(images), test=ImageSet(images[:8]))
    assert make_parts(splits, 'paper', encoder, tmp_path, **options)['test'].shape == (8, 8, 8)
    labels = learn_paper_parts(images, encoder, **options).predict(images)
    edge = torch.cat([labels[:, [0, -1]].flatten(), labels[:, 1:-1, [0, -1]].flatten()])
    assert edge.mode().values == 0, 'what holds most of the border comes first'
    with pytest.raises(SemmaeError, match='parts.diversity'):
        learn_paper_parts(torch.full_like(images, 128), encoder, **options)
