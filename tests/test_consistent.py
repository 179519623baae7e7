"Counts and information against brute force and scikit-learn, planted parts, views against their images."
import pytest
import torch
from conftest import TRUTH, painted
from hypothesis import given, settings, strategies as st
from sklearn.metrics import mutual_info_score

from semmae.core import SemmaeError, generator
from semmae.images import ImageSet
from semmae.parts import consistency
from semmae.pipeline.consistent import (consistent_parts, label_shares, mutual_information,
                                        neighbour_information, neighbours, new_nets, paste, take_views)
from semmae.pipeline.maps import make_parts


def front_of(seed, n=3, h=5, w=6):
    return torch.rand(n, h, w, generator=generator('front', seed)) < .6


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_information_is_sklearns(seed, n):
    met = torch.randint(1, 50, (n, n), generator=generator(seed)).double()
    assert mutual_information(met).item() == pytest.approx(
        mutual_info_score(None, None, contingency=(met + met.mT).long().numpy()), abs=1e-4)
    assert mutual_information(7*met).item() == pytest.approx(mutual_information(met).item(), abs=1e-6), (
        'how many were counted does not matter')


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(-3, 3), st.integers(-3, 3))
def test_neighbours_are_those_of_the_foreground(seed, dy, dx):
    front = front_of(seed)
    brute = {(b, y*6 + x, (y + dy)*6 + x + dx) for b in range(3) for y in range(5) for x in range(6)
             if 0 <= y + dy < 5 and 0 <= x + dx < 6 and front[b, y, x] and front[b, y + dy, x + dx]}
    assert set(zip(*(v.tolist() for v in neighbours(front, dy, dx)))) == brute


@pytest.mark.parametrize('across', [0, .3, 1])
def test_what_is_told_is_told_over_all_images_and_within_each(across):
    front, one, other = front_of(0), *torch.randn(2, 3, 30, 4, generator=generator(1))
    nets = new_nets(2, 4, 3, generator(2))
    met = torch.zeros(2, 3, 3, 3)  # net, image, label, label
    for b, i, j in zip(*neighbours(front, 1, -1)):
        p, q = (label_shares(nets, x[None])[:, 0] for x in (one[b, i], other[b, j]))
        met[:, b] += p[:, :, None]*q[:, None]
    for k in range(2):
        each = sum(mutual_information(met[k, b]) for b in range(3))/3
        assert neighbour_information(nets, one, other, front, (1, -1), across)[k] == pytest.approx(
            (across*mutual_information(met[k].sum(0)) + (1 - across)*each).item(), abs=1e-5)


def test_an_image_without_a_pair_does_not_count():
    front = front_of(3)
    nets, x = new_nets(2, 4, 3, generator(2)), torch.randn(3, 30, 4, generator=generator(1))
    lone = torch.cat([front, torch.zeros(1, 5, 6, dtype=torch.bool)])
    more = torch.cat([x, x[:1]])
    assert torch.allclose(neighbour_information(nets, x, x, front, (0, 1), .5),
                          neighbour_information(nets, more, more, lone, (0, 1), .5))


def test_a_step_without_a_pair_teaches_nothing_and_does_no_harm():
    nets = {k: v.requires_grad_() for k, v in new_nets(2, 4, 3, generator(2)).items()}
    x, front = torch.randn(3, 30, 4, generator=generator(1)), torch.zeros(3, 5, 6, dtype=torch.bool)
    front[:, 2, 2] = True  # and no neighbour
    some = neighbour_information(nets, x, x, front, (0, 1), .5)
    some.sum().backward()
    assert some.isfinite().all() and all(v.grad is None or v.grad.isfinite().all() for v in nets.values())


def test_of_many_pairs_every_so_manieth_is_looked_at():
    front, nets, x = (torch.ones(3, 5, 6, dtype=torch.bool), new_nets(2, 4, 3, generator(2)),
                      torch.randn(3, 30, 4, generator=generator(1)))
    b, i, j = (v[::4] for v in neighbours(front, 0, 1))  # of 75, at most 24
    met = torch.zeros(2, 3, 9).index_add(
        1, b, (label_shares(nets, x[b, i])[..., None]*label_shares(nets, x[b, j])[..., None, :]).flatten(2)
    ).unflatten(2, (3, 3))
    found = neighbour_information(nets, x, x, front, (0, 1), 1, most=24)
    assert torch.allclose(found, mutual_information(met.sum(1)), atol=1e-5)


def test_pasting_keeps_the_foreground_and_no_background():
    images = (torch.arange(6)[:, None, None, None]*40).expand(6, 3, 32, 32).to(torch.uint8).clone()
    front = torch.zeros(6, 8, 8, dtype=torch.bool)
    front[:, 3:6, 2:6] = True
    images[:, :, 12:24, 8:24] = 255
    out = paste(images, front, generator(0))
    assert (out[:, :, 14:22, 10:22] == 255).all()
    corner = out[:, 0, 0, 0]
    assert (sorted(corner.tolist()) == sorted(images[:, 0, 0, 0].tolist())
            and (corner != images[:, 0, 0, 0]).all())


def test_what_stood_on_a_background_is_painted_over_with_its_colours():
    images, front = (torch.tensor([40, 160], dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 32, 32),
                     torch.zeros(2, 8, 8, dtype=torch.bool))
    front[0, 1:7, :3] = front[1, 1:7, 5:] = True
    up = front[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(images)
    images[up] = 255
    out = paste(images, front, generator(0))
    assert (out[0, :, 8:24, 24:28] == 160).all() and (out[1, :, 8:24, 4:8] == 40).all()


def test_planted_parts_are_found(planted):
    encoder, images = planted
    parts = consistent_parts(images[:30], encoder, n_parts=4, steps=50, share=.3)
    scores = consistency(parts.predict(images[30:]), TRUTH[30:])
    assert scores['fg_nmi'] > .8 and scores['fg_iou'] > .9


def test_a_mirrored_view_lies_where_the_image_does(planted):
    encoder, images = planted
    views = take_views(images[:30], encoder, pastes=0, share=.3)[2]
    assert len(views) == 2 and torch.allclose(views[0], views[1], atol=.02)


def test_two_parts_are_foreground_and_background(planted):
    encoder, images = planted
    maps = consistent_parts(images[:30], encoder, n_parts=2, pastes=0, steps=5, share=.3).predict(images[30:])
    assert ((maps == 1) == (TRUTH[30:] > 0)).float().mean() > .95 and maps.max() == 1


def test_a_collapse_is_said(planted):
    "Where one part is nearly all there is"
    truth = (TRUTH[:30] > 0).long()
    truth[:3, 3, 3] = 2
    with pytest.raises(SemmaeError, match='parts.n_parts'):
        consistent_parts(painted(truth, noise=0), planted[0], n_parts=3, pastes=0, steps=5, share=.3)


def test_the_same_seed_learns_the_same(planted):
    encoder, images = planted
    options = dict(n_parts=4, pastes=0, steps=3, share=.3)
    one, again, other = (consistent_parts(images, encoder, **options, seed=s).state for s in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one) and not torch.equal(one['w1'], other['w1'])


def test_a_profile_may_ask_for_them(planted, tmp_path):
    encoder, images = planted
    maps = make_parts(dict(train=ImageSet(images), test=ImageSet(images[:8])), 'consistent', encoder,
                      tmp_path, n_parts=4, pastes=0, steps=3, share=.3, block=2)
    assert maps['test'].shape == (8, 8, 8)
    with pytest.raises(SemmaeError, match='parts.n_parts'):
        make_parts(dict(train=ImageSet(images)), 'consistent', encoder, tmp_path, n_parts=65)
