"Learning with labels: the head, the step, few labels, parts"
import random

import numpy as np
import pytest, torch
from conftest import random_images, small_encoder
from PIL import Image
from sklearn.metrics import jaccard_score
from timm.data import create_transform
from torch.nn import functional as F

from semmae.core import SemmaeError, generator
from semmae.finetune import (Augment, Labelled, Probed, finetune, framed, lars, mixing, outputs, probe,
                             with_head)
from semmae.images import IMAGENET, ImageSet, few_labels
from semmae.segment import at_cells, linear_head, part_iou, segment, segmented
from semmae.vit import encode, pixels_of

silent = lambda line: None


@pytest.fixture
def encoder():
    return small_encoder().eval()


@pytest.fixture
def images():
    return random_images(24, 32, 32)


@pytest.mark.parametrize('kw', [{}, dict(global_pool='avg'), dict(class_token=False, global_pool='avg')])
def test_a_head_reads_the_encoders_own_tokens(images, kw):
    encoder = small_encoder(**kw).eval()
    torch.nn.init.normal_(encoder.fc_norm.weight if 'global_pool' in kw else encoder.norm.weight,
                          generator=generator('norm'))
    imgs, n = pixels_of(encoder, images), encoder.num_prefix_tokens
    own = encode(encoder, imgs)
    for pool in ('avg', '') + (('token',) if n else ()):
        model = with_head(encoder, 5, pool, drop_path=.5).eval()
        assert [getattr(b.drop_path2, 'drop_prob', 0) for b in model.blocks] == [0, .5]
        assert (model(imgs) == 0).all()
        torch.nn.init.normal_(model.head.weight, generator=generator('head'))
        if pool == '':
            assert torch.allclose(model(imgs), model.head(own), atol=1e-4)
        if pool == 'token':
            assert torch.allclose(model(imgs), model.head(own[:, 0]), atol=1e-4)
        if pool == 'avg':  # the mean comes before the norm, as in MAE
            before = torch.cat([model.forward_features(x)[:, n:] for x in imgs.split(5)]).mean(1)
            assert torch.allclose(model(imgs), model.head(model.fc_norm(before)), atol=1e-4)
            assert torch.equal(model.fc_norm.weight,
                               (encoder.fc_norm if 'global_pool' in kw else encoder.norm).weight)


def test_deeper_layers_learn_faster(encoder, images):
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    model, _ = finetune(encoder, images, torch.arange(24) % 2, epochs=2, batch=12, lr=.01, warmup_epochs=0,
                        layer_decay=.1, weight_decay=0, drop_path=0, log=silent)
    moved = lambda name: (model.state_dict()[name] - start[name]).abs().max().item()
    shallow, deep = moved('blocks.0.mlp.fc1.weight'), moved('blocks.1.mlp.fc1.weight')
    # Adam's steps are as long as the rate
    assert (deep == pytest.approx(10*shallow, rel=.1)
            and moved('patch_embed.proj.weight') == pytest.approx(shallow/10, rel=.1))
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in start.items()), (
        'the encoder stays what it was')


@pytest.mark.parametrize('learn', ['classes', 'parts'])
def test_an_interrupted_run_goes_on_to_the_same_end(encoder, images, tmp_path, learn):
    targets = (torch.arange(24) % 3 if learn == 'classes'
               else torch.randint(0, 3, (24, 8, 8), generator=generator('parts')))
    run = lambda log=silent, checkpoint=None: (finetune if learn == 'classes' else segment)(
        encoder, images, targets, epochs=3, batch=8, lr=.01, warmup_epochs=1, log=log, checkpoint=checkpoint)
    model, history = run()
    def stop(line):
        if line.startswith('epoch 2'):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(stop, tmp_path/'state.pt')
    lines = []
    again, same = run(lines.append, tmp_path/'state.pt')
    assert len(lines) == 1 and same == history
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_mixing_is_a_function_of_seed_and_step(images):
    imgs, y = images[:8].float(), torch.arange(8) % 3
    mix = lambda seed, step, **kw: mixing(3, **(dict(mixup=.8, cutmix=1., smoothing=.1, erase=.5) | kw),
                                          seed=seed, device=torch.device('cpu'))(imgs.clone(), y, step, 0)
    torch.manual_seed(0)
    one = mix(0, 5)
    torch.manual_seed(0)
    again = mix(0, 5)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[1], mix(0, 6)[1]) and not torch.equal(one[1], mix(1, 5)[1])
    plain, shares = mix(0, 0, mixup=0, cutmix=0, erase=0)
    assert torch.equal(plain, imgs) and torch.allclose(shares, .9*F.one_hot(y, 3) + .1/3)


def test_targets_follow_their_images(encoder):
    "An image that shows its own part map"
    parts = torch.randint(0, 3, (6, 4, 4), generator=generator('parts'))
    images = (parts*100)[:, None].expand(-1, 3, -1, -1).byte().repeat_interleave(8, 2).repeat_interleave(8, 3)
    batches = Labelled(images, parts, 3, with_head(encoder, 3, ''), 2, 6, (1., 1.), 0, 'segment')
    for step in range(2):
        imgs, maps = batches.at(step)
        shown = F.avg_pool2d(imgs[:, 0], 8)
        values = shown.unique()
        assert len(values) == 3 and torch.equal(torch.searchsorted(values, shown), maps)
    assert not torch.equal(batches.at(0)[1], batches.at(1)[1])


def test_pixels_are_those_that_the_encoder_expects(images):
    encoder = small_encoder(stats=[[.5]*3, [.25]*3])
    imgs, _ = Labelled(images, torch.zeros(24, dtype=torch.long), 1, with_head(encoder, 1),
                       1, 24, (1., 1.), 0, 'finetune').at(0)
    for how in (torch.max, torch.min):
        assert how(imgs).item() == pytest.approx((how(images).item()/255 - .5)/.25, abs=1e-4)


@pytest.mark.parametrize('seed', range(3))
def test_iou_is_sklearns(seed):
    pred, true = (torch.randint(0, 4, (5, 6, 7), generator=generator(k, seed)) for k in 'pt')
    assert part_iou(pred, true, 4).tolist() == pytest.approx(
        jaccard_score(true.flatten(), pred.flatten(), average=None).tolist())
    assert part_iou(pred, true, 5)[4].isnan()


def test_a_linear_head_finds_what_patches_show(encoder, images):
    "Parts are how bright a patch is: the mean of its tokens' pixels is linear in them"
    gen, shade = generator('bright'), torch.tensor([20, 120, 230])
    parts = torch.randint(0, 3, (60, 4, 4), generator=gen)
    show = shade[parts][:, None].expand(-1, 3, -1, -1).byte().repeat_interleave(8, 2).repeat_interleave(8, 3)
    sets = [ImageSet(show[s], parts=parts[s]) for s in (slice(40), slice(40, 50), slice(50, 60))]
    encoder.norm.weight.data = torch.logspace(-1, 1, 32)  # channels of unlike spread
    model = linear_head(encoder, *sets[:2], 3)
    assert part_iou(segmented(model, sets[2].images, (4, 4)), sets[2].parts, 3).min() > .9
    shares = torch.cat(list(outputs(model, sets[0].images)))[:, 1:].softmax(2).mean((0, 1))
    assert torch.allclose(shares, F.one_hot(sets[0].parts, 3).float().mean((0, 1, 2)), atol=2e-3), (
        'at the optimum parts are given as much as they hold')
    out = torch.cat(list(outputs(model, sets[2].images)))
    assert torch.allclose(at_cells(model, out[:, 1:], (4, 4)).flatten(2).mT, out[:, 1:], atol=1e-5)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in encoder.state_dict().items())


def test_few_labels_are_the_same_share_of_every_class():
    classes = torch.tensor([0]*40 + [1]*20 + [2]*60)
    ids = few_labels(classes, .1)
    assert (classes[ids].bincount().tolist() == [4, 2, 6] and torch.equal(ids, few_labels(classes, .1))
            and not torch.equal(ids, few_labels(classes, .1, seed=1)))
    with pytest.raises(SemmaeError, match='dog'):
        few_labels(classes, .02, names=['cat', 'dog', 'owl'])


@pytest.mark.parametrize('change, named', [
    (dict(targets=torch.arange(24), n=3), '23'), (dict(targets=torch.arange(9)), '24 .* 9'),
    (dict(batch=100), 'finetune.batch')])
def test_what_is_wrong_is_named(encoder, images, change, named):
    change = dict(change)
    targets, n = change.pop('targets', torch.arange(24) % 2), change.pop('n', None)
    with pytest.raises(SemmaeError, match=named):
        finetune(encoder, images, targets, n, **dict(epochs=2, batch=8, warmup_epochs=1, log=silent) | change)


def test_lars_steps_as_maes_own():
    "Weights by their norm over the gradient's, biases by momentum alone, whatever the rate"
    torch.manual_seed(0)
    head = torch.nn.Linear(7, 5)
    torch.nn.init.normal_(head.bias)
    ours, opt = [p.detach().clone() for p in head.parameters()], lars(head)
    speed = [torch.zeros_like(p) for p in ours]
    for rate in (.5, 2., 30., 4.):
        for p, x, v in zip(head.parameters(), ours, speed, strict=True):
            p.grad = torch.randn_like(p)
            v.mul_(.9).add_(p.grad*(.001*x.norm()/p.grad.norm() if p.ndim > 1 else 1))
            x.sub_(rate*v)
        for group in opt.param_groups:
            group['lr'] = rate
        opt.step()
    for p, x in zip(head.parameters(), ours, strict=True):
        assert torch.allclose(p, x, rtol=1e-5)


def test_only_the_layer_of_a_probe_learns(encoder, images):
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    model, history = probe(encoder, images, torch.arange(24) % 2, epochs=3, batch=12, lr=1., warmup_epochs=1,
                           accumulate=2, log=silent)
    assert len(history) == 3 and model.vit.head.weight.shape == (2, 32)
    assert all(torch.equal(v, model.vit.state_dict()[k]) for k, v in start.items())
    fresh = Probed(encoder, 2).eval()
    assert not torch.equal(model.vit.head.weight, fresh.vit.head.weight)
    imgs = pixels_of(encoder, images)
    tokens = encode(encoder, imgs)[:, 0]
    even = (tokens - tokens.mean(0))/tokens.std(0, correction=0)
    assert torch.allclose(fresh.train()(imgs), fresh.vit.head(even), atol=1e-3), (
        'features of the class token have mean 0 and deviation 1')


def test_turns_of_a_process_give_what_one_gives(encoder, images):
    run = lambda turns: finetune(encoder, images, torch.arange(24) % 3, epochs=2, batch=12, lr=.01,
                                 warmup_epochs=0, drop_path=0, mixup=0, cutmix=0, erase=0,
                                 accumulate=turns, log=silent)[1]
    for one, three in zip(run(1), run(3), strict=True):
        assert one['loss'] == pytest.approx(three['loss'], rel=1e-4)


def test_images_are_changed_as_timm_changes_them():
    policy, imgs = 'rand-m9-mstd0.5-inc1', random_images(12, 40, 48)
    theirs = create_transform((3, 40, 48), is_training=True, auto_augment=policy, interpolation='bicubic',
                              separate=True)[1]
    ours = Augment(policy, IMAGENET, (40, 48))(imgs, torch.arange(12)/2**32)
    for i, img in enumerate(imgs):
        random.seed(i)
        np.random.seed(i)
        changed = theirs(Image.fromarray(img.permute(1, 2, 0).numpy()))
        assert np.array_equal(ours[i].permute(1, 2, 0).numpy(), np.asarray(changed)), i


def test_a_frame_is_cut_around_the_middle():
    imgs = random_images(2, 256, 256)
    assert torch.equal(framed(imgs, .875), imgs[:, :, 16:240, 16:240]) and framed(imgs, 1).shape == imgs.shape


def test_the_rate_comes_down_to_what_is_said(encoder, images):
    _, history = finetune(encoder, images, torch.arange(24) % 2, epochs=50, batch=24, lr=.01, warmup_epochs=1,
                          min_lr=1e-4, log=silent)
    assert history[-1]['lr'] == pytest.approx(1e-4, rel=.05)


def test_no_bits_are_black():
    "At its largest magnitude one of timm's changes keeps none, about which Pillow and timm disagree"
    imgs = random_images(200, 16, 16).clamp(min=1)
    changed = Augment('rand-m10-inc1', IMAGENET, (16, 16))(imgs, torch.arange(200)/2**32)
    assert (changed == 0).flatten(1).all(1).any()


def test_what_is_asked_for_reaches_the_images_and_the_head(encoder, images):
    y, model = torch.arange(24) % 3, with_head(encoder, 3)
    at = lambda **kw: Labelled(images, y, 3, model, 1, 24, (1., 1.), 0, 'finetune', **kw).at(0)[0]
    assert not torch.equal(at(), at(augment='rand-m9-mstd0.5-inc1'))
    learned, _ = finetune(encoder, images, y, epochs=1, batch=24, lr=0, warmup_epochs=0, head_std=.5,
                          log=silent)
    assert learned.head.weight.std().item() == pytest.approx(.5, rel=.3)
    inner = torch.cat(list(outputs(learned, images[:, :, 8:24, 8:24])))
    assert torch.allclose(torch.cat(list(outputs(learned, images, frame=.5))), inner, atol=1e-5)
    blotted = mixing(3, 0, 0, 0, 1., 0, torch.device('cpu'))(torch.zeros(24, 3, 32, 32), y, 0, 0)[0]
    assert len(blotted.unique()) > 1000, 'every pixel of a blot has a value of its own'


def test_shares_that_cannot_be_mixed_are_named(encoder, images):
    with pytest.raises(SemmaeError, match='finetune.batch'):
        finetune(encoder, images, torch.arange(24) % 3, epochs=1, batch=12, warmup_epochs=0, accumulate=4,
                 log=silent)
