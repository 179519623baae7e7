"The teacher: its loss against a plain retelling, its balance, several processes, interruptions."
import math

import pytest
import torch
from test_engine import same, several
from torch.nn import functional as F
from conftest import ROOT, random_images, small_encoder as encoder
from worker import teach

from semmae.core import SemmaeError, generator
from semmae.pipeline.data import load_images
from semmae.teacher import (Distiller, Sums, Views, balance, distil, place, random_blocks, random_colours,
                            shared_bits, view)
from semmae.vit import encode

IMAGES = random_images(40, 40, 40)


def views(step=3, **kw):
    return Views(IMAGES, encoder(), epochs=2, batch=6, **kw).at(step)


def answers(scores, sharp, balanced, centre):
    return balance(scores, sharp) if balanced else ((scores - centre)/sharp).softmax(1)


@pytest.mark.parametrize('balanced', [True, False])
@pytest.mark.parametrize('n_small', [0, 3])
def test_the_loss_is_what_ibot_says(balanced, n_small):
    "View by view and image by image: every view but the teacher's own, every hidden patch, once an image"
    both = Distiller(encoder(), n_words=12, balanced=balanced)
    for k, p in enumerate(both.teacher.parameters()):
        p.add_(torch.randn(p.shape, generator=generator('other', k))*.1)
    both.centres.copy_(torch.randn(2, 12, generator=generator('centres'))*.1)
    large, hide, small, seen = views(n_small=n_small)
    loss, sums = both(large, hide, small, seen, .05)

    tokens = encode(both.teacher['encoder'], large)
    head = both.teacher['head']
    whole = answers(head(tokens[:, 0]), .05, balanced, both.centres[0])
    patches = answers(head(tokens[:, 1:][hide]), .05, balanced, both.centres[1])
    words = lambda x: F.log_softmax(both.student['head'](x)/.1, 1)
    painted = encode(both.student['encoder'], large, hide=hide, token=both.token)
    from_large, from_patches = words(painted[:, 0]), words(painted[:, 1:][hide])
    pairs = [[whole[i + 6*t] @ from_large[i + 6*(1 - t)] for i in range(6)] for t in (0, 1)]
    # a head standardises what it gets at once
    crops = words(encode(both.student['encoder'], small, seen)[:, 0]) if n_small else []
    for k in range(n_small):
        pairs += [[whole[i + 6*t] @ crops[6*k + i] for i in range(6)] for t in (0, 1)]
    where = hide.nonzero()[:, 0]
    masked = [torch.stack([patches[j] @ from_patches[j] for j in (where == i).nonzero()[:, 0]]).mean()
              if hide[i].any() else torch.tensor(0.) for i in range(12)]
    assert loss.item() == pytest.approx(-(torch.stack([torch.stack(p) for p in pairs]).mean()
                                          + torch.stack(masked).mean()).item(), abs=1e-5)
    assert (torch.allclose(sums.answers, whole.view(2, 6, 12).sum(1), atol=1e-5)
            and sums.tokens.tolist() == [12, int(hide.sum())])
    assert sums.agree.item() == pytest.approx(sum((whole[i] @ whole[i + 6]).item() for i in range(6)),
                                              abs=1e-5)


def test_the_teacher_follows_and_is_not_taught():
    both = Distiller(encoder(), n_words=12, balanced=False)
    both.student['head'].words.data += 1
    before = both.teacher['head'].words.clone()
    loss, sums = both(*views(), .05)
    loss.backward()
    assert (all(p.grad is None for p in both.teacher.parameters())
            and all(p.grad is not None for p in both.student.parameters()))
    both.follow(sums, .75, centring=.5)
    assert torch.allclose(both.teacher['head'].words, .75*before + .25*both.student['head'].words)
    assert torch.allclose(both.centres[0], .5*sums.scores[0]/12, atol=1e-6)
    kept = both.centres[1].clone()
    both.follow(sums._replace(tokens=torch.tensor([12, 0])), 1.)  # nothing was hidden
    assert torch.equal(both.centres[1], kept)


def test_balance_is_the_nearest_balanced_table():
    "Rows and columns are scaled, nothing else: rows sum to 1, columns to equal shares"
    scores = torch.randn(30, 5, generator=generator('scores'))
    q = balance(scores, .5, rounds=200)
    assert (torch.allclose(q.sum(0), torch.full((5,), 6.), atol=1e-3)
            and torch.allclose(q.sum(1), torch.ones(30), atol=1e-5))
    ratio = lambda t: t[0, 0] + t[1, 1] - t[0, 1] - t[1, 0]
    assert ratio(q.log()).item() == pytest.approx(ratio(scores/.5).item(), abs=1e-3)


def test_bits_say_how_much_likelier_two_views_of_one_image_agree():
    "Against all pairs of images, one by one; cut into steps as it comes"
    a, b = (torch.rand(30, 7, generator=generator(k)).softmax(1) for k in 'ab')
    b = (a + b)/2
    steps = [Sums(torch.zeros(2, 7), torch.tensor([2*len(x), 0]), torch.stack([x.sum(0), y.sum(0)]),
                 (x*y).sum()) for x, y in zip(a.split(20), b.split(20))]
    agree = [[(x @ y).item() for y in b] for x in a]
    own, any = sum(agree[i][i] for i in range(30))/30, sum(map(sum, agree))/900
    assert shared_bits(steps) == pytest.approx(math.log2(own/any), abs=1e-5)


ART = load_images('data', ['train'], root=ROOT, size=(32, 32), limit=64)[0].images


def mute(vit):
    "An encoder that says the same of every image"
    torch.nn.init.zeros_(vit.norm.weight)
    return vit


@pytest.mark.parametrize('vit, images, lr', [
    (encoder(), ART[:1].repeat(64, 1, 1, 1), 2e-3), (mute(encoder()), ART, 0.)], ids=['one image', 'mute'])
def test_collapse_is_said(vit, images, lr):
    "With nothing to tell apart, and with an encoder that says the same of everything"
    with pytest.raises(SemmaeError, match='teacher.lr'):
        distil(vit, images, epochs=12, batch=32, warmup_epochs=1, n_words=32, lr=lr, log=lambda line: None)


def test_what_learns_is_not_called_collapsed():
    history = distil(encoder(), ART, epochs=12, batch=32, warmup_epochs=1, n_words=32, lr=8e-3,
                     log=lambda line: None)
    assert history[-1]['bits'] > .5


def test_the_result_is_the_average_of_the_student():
    "Told again by hand: an epoch is one step, after which the encoder is the student as it is now"
    vit, kept = encoder(), []
    weight = vit.blocks[0].mlp.fc1.weight
    by_hand = weight.detach().clone()
    distil(vit, ART, epochs=6, batch=64, warmup_epochs=1, n_words=16, momentum=.8,
           log=lambda line: kept.append(weight.detach().clone()))
    for step, student in enumerate(kept):
        by_hand.lerp_(student, .2*(1 + math.cos(math.pi*step/6))/2)
    assert torch.allclose(weight, by_hand, atol=1e-6)
    assert (weight - kept[-1]).abs().max() > 1e-4, 'and not the student'


def test_what_is_given_is_used():
    def learned(**options):
        vit = encoder()
        distil(vit, ART, **dict(epochs=1, batch=32, warmup_epochs=1, n_words=16, clip=1e9, lr=1e-2,
                                log=lambda line: None) | options)
        return vit.blocks[0].mlp.fc1.weight
    usual = learned()
    assert torch.equal(learned(clip=0.), usual)
    for other in dict(clip=1e-4), dict(weight_decay=3.), dict(small=(.9, 1.)), dict(large=(.9, 1.)):
        assert not torch.equal(learned(**other), usual), other


def test_colours_turn_and_images_are_mirrored():
    red = torch.tensor([140., 90., 90.])[:, None, None].expand(64, 3, 4, 4)
    turned = random_colours(red, generator('turn'), strength=0, grey=0)[:, :, 0, 0]
    assert torch.allclose(turned.mean(1), torch.full((64,), 320/3), atol=1e-2), (
        'a turn around the axis of greys keeps the mean')
    assert torch.allclose(turned.var(1), turned.var(1)[:1].expand(64), rtol=1e-3), 'and the distance from it'
    assert all((turned.argmax(1) == k).any() for k in range(3)), 'and reaches every hue'
    slope = torch.arange(32.).expand(64, 3, 32, 32).to(torch.uint8)*8
    seen = view(slope, (8, 8), (.9, 1.), generator('mirror'))
    rises = (seen[..., -1] > seen[..., 0]).float().mean((1, 2)).round()
    assert 10 < rises.sum() < 54


@pytest.mark.parametrize('ranks', [2, 4])
def test_processes_share_the_views_of_one(ranks):
    of = Views(IMAGES, encoder(), epochs=2, batch=6)
    large, hide, small, seen = of.at(5)
    shares = [of.at(5, r, ranks) for r in range(ranks)]
    rejoin = lambda k, n: torch.cat([torch.cat([s[k].chunk(n)[v] for s in shares]) for v in range(n)])
    assert torch.allclose(rejoin(0, 2), large, atol=1e-5) and torch.equal(rejoin(1, 2), hide)
    assert torch.allclose(rejoin(2, 2), small, atol=1e-5) and torch.equal(rejoin(3, 2), seen)


def test_a_small_crop_is_seen_where_it_lies():
    "Moved on its frame it gives the same tokens, but for the positions"
    vit = encoder().eval()
    vit.pos_embed.data.zero_()
    imgs = torch.randn(2, 3, 16, 16, generator=generator('small'))
    tokens = [encode(vit, *place(imgs, (32, 32), 8, generator(k))) for k in range(8)]
    assert len({str(place(imgs, (32, 32), 8, generator(k))[1].tolist()) for k in range(8)}) > 3
    for t in tokens:
        assert torch.allclose(t, tokens[0], atol=1e-5)


@pytest.mark.parametrize('grid', [(3, 3), (8, 12), (16, 16)])
def test_as_much_is_hidden_as_was_drawn(grid):
    hide = random_blocks(300, grid, generator('blocks'), share=(.2, .4), chance=1.)
    n = grid[0]*grid[1]
    assert .2*n <= hide.sum(1).min() and hide.sum(1).max() <= math.ceil(.4*n)
    assert (hide.float().mean(0) > .1).all(), 'no place is spared'


@pytest.mark.parametrize('n, options', [(2, {}), (3, dict(balanced=False, lr=1e-4, sharp=.01))])
def test_several_processes_give_what_one_gives(tmp_path, n, options):
    "But for the order of sums; 3 processes do not divide a batch of 16"
    several(tmp_path/'one', 1, teach, **options)
    several(tmp_path/'some', n, teach, **options)
    same(tmp_path/'some', tmp_path/'one', 1e-4)


def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path):
    for name, stops in dict(whole=[None], parts=[1, 2, None]).items():
        (tmp_path/name).mkdir()
        for stop in stops:
            teach(tmp_path/name, stop_after=stop)
    same(tmp_path/'parts', tmp_path/'whole', 0)


@pytest.mark.parametrize('options, key', [
    (dict(batch=41), 'teacher.batch'),
    (dict(encoder=dict(class_token=False, global_pool='avg')), 'teacher.encoder')])
def test_what_does_not_go_with_these_images_is_named(options, key):
    options = dict(options)
    with pytest.raises(SemmaeError, match=key):
        distil(encoder(**options.pop('encoder', {})), IMAGES,
               **dict(epochs=3, batch=6, warmup_epochs=1) | options)


def test_a_model_with_dropout_goes_on_bit_by_bit_too(tmp_path):
    def train(state, stop=None):
        lines = []
        def log(line):
            lines.append(line)
            if len(lines) == stop:
                raise KeyboardInterrupt
        vit = encoder(proj_drop_rate=.2, drop_path_rate=.2)
        try:
            distil(vit, ART, epochs=4, batch=32, warmup_epochs=1, n_words=16, lr=1e-3, checkpoint=state,
                   log=log)
        except KeyboardInterrupt:
            torch.rand(7)  # whatever else draws in between
        return vit.blocks[0].mlp.fc1.weight
    whole = train(tmp_path/'a.pt')
    train(tmp_path/'b.pt', stop=2)
    assert torch.equal(train(tmp_path/'b.pt'), whole)
