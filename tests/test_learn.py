"Counts and information against brute force and scikit-learn, planted parts, files against mistakes."
import pytest
import torch
from conftest import painted, placeless_encoder, small_encoder
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.metrics import mutual_info_score
from torch.nn import functional as F

from semmae.core import SemmaeError, generator
from semmae.images import ImageSet
from semmae.learn import (mutual_information, label_shares, learn_parts, load_learned, neighbours, new_nets,
                          paste, neighbour_information, take_views)
from semmae.paper import PartTokens, StyleDecoder, alike, standard_tokens, learn_paper_parts
from semmae.parts import batched_outputs, score_parts
from semmae.pipeline.maps import make_parts
from semmae.sources import load_images


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


TRUTH = torch.zeros(40, 8, 8, dtype=torch.long)  # a thing of three parts in every image
for k in range(40):
    y, x = torch.randint(1, 3, (2,), generator=generator('place', k)).tolist()
    for part in range(3):
        TRUTH[k, y + part*5//3:y + (part + 1)*5//3, x:x + 4] = part + 1


@pytest.fixture
def planted():
    return placeless_encoder((16, 16), depth=1), painted(TRUTH)


def test_planted_parts_are_found(planted):
    encoder, images = planted
    parts = learn_parts(images[:30], encoder, n_parts=4, steps=50, share=.3)
    scores = score_parts(parts.predict(images[30:]), TRUTH[30:])
    assert scores['fg_nmi'] > .8 and scores['fg_iou'] > .9


def test_a_mirrored_view_lies_where_the_image_does(planted):
    encoder, images = planted
    views = take_views(images[:30], encoder, pastes=0, share=.3)[2]
    assert len(views) == 2 and torch.allclose(views[0], views[1], atol=.02)


def test_two_parts_are_foreground_and_background(planted):
    encoder, images = planted
    maps = learn_parts(images[:30], encoder, n_parts=2, pastes=0, steps=5, share=.3).predict(images[30:])
    assert ((maps == 1) == (TRUTH[30:] > 0)).float().mean() > .95 and maps.max() == 1


def test_a_collapse_is_said(planted):
    "Where one part is nearly all there is"
    truth = (TRUTH[:30] > 0).long()
    truth[:3, 3, 3] = 2
    with pytest.raises(SemmaeError, match='parts.n_parts'):
        learn_parts(painted(truth, noise=0), planted[0], n_parts=3, pastes=0, steps=5, share=.3)


def test_a_stream_teaches_what_its_images_do(tmp_path):
    "Through an encoder, to the bit"
    for k in range(12):
        Image.fromarray(torch.randint(256, (16, 16, 3), generator=generator(k),
                                      dtype=torch.uint8).numpy()).save(tmp_path/f'{k}.png')
    encoder = small_encoder(image=(16, 16), patch_size=4)
    images, stream = (load_images(tmp_path, ['train'], size=(16, 16), stream=s)[0].images
                      for s in (False, True))
    one, other = (learn_parts(x, encoder, n_parts=3, steps=5) for x in (images, stream))
    assert (all(torch.equal(one.state[k], other.state[k]) for k in one.state)
            and torch.equal(one.predict(images), other.predict(images)))


def test_the_same_seed_learns_the_same(planted):
    encoder, images = planted
    one, again, other = (learn_parts(images, encoder, n_parts=4, pastes=0, steps=3, share=.3, seed=s).state
                         for s in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one) and not torch.equal(one['w1'], other['w1'])


def test_learned_parts_come_back_from_their_file_and_from_no_other(planted, tmp_path):
    encoder, images = placeless_encoder((16, 16), depth=4), planted[1]
    parts = learn_parts(images, encoder, n_parts=4, pastes=0, steps=3, share=.3)
    parts.save(tmp_path/'parts.safetensors')
    back = load_learned(tmp_path/'parts.safetensors', encoder)
    assert back.blocks == [2, 3, 4] and torch.equal(back.predict(images), parts.predict(images))
    (tmp_path/'broken.safetensors').write_bytes((tmp_path/'parts.safetensors').read_bytes()[:-9])
    for file, vit in (('broken', encoder), ('none', encoder), ('parts', small_encoder())):
        with pytest.raises(SemmaeError, match=f'{file}.safetensors'):
            load_learned(tmp_path/f'{file}.safetensors', vit)


def test_a_profile_may_ask_for_them(planted):
    encoder, images = planted
    maps = make_parts(dict(train=ImageSet(images), test=ImageSet(images[:8])), 'learned', encoder,
                      n_parts=4, pastes=0, steps=3, share=.3, block=2)
    assert torch.cat(list(maps['test'])).shape == (8, 8, 8)
    with pytest.raises(SemmaeError, match='parts.n_parts'):
        make_parts(dict(train=ImageSet(images)), 'learned', encoder, n_parts=65)


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


def test_the_papers_way_by_value_and_its_collapse(planted):
    encoder, images = planted
    options = dict(n_parts=3, steps=10)
    one, again, other = (learn_paper_parts(images, encoder, **options, seed=s).maps.state_dict()
                         for s in (0, 0, 1))
    assert (all(torch.equal(one[k], again[k]) for k in one)
            and not all(torch.equal(one[k], other[k]) for k in one))
    assert torch.cat(list(make_parts(dict(train=ImageSet(images), test=ImageSet(images[:8])),
                                     'paper', encoder, **options)['test'])).shape == (8, 8, 8)
    labels = learn_paper_parts(images, encoder, **options).predict(images)
    edge = torch.cat([labels[:, [0, -1]].flatten(), labels[:, 1:-1, [0, -1]].flatten()])
    assert edge.mode().values == 0, 'what holds most of the border comes first'
    with pytest.raises(SemmaeError, match='parts.diversity'):
        learn_paper_parts(torch.full_like(images, 128), encoder, **options)
