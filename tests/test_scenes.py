"UPerNet against its definition, scores against scikit-learn, crops and windows against the image itself."
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.nn import functional as F

from semmae import scenes
from semmae.core import SemmaeError, generator
from semmae.images import VOID, ImageSet
from semmae.scenes import (Scenes, UPerNet, label_map, learn_scenes, make_heads, random_piece, random_scene,
                           scaled, scene_map, scene_scores, scores_of, slide, starts)
from semmae.segment import confusion, linear_head, part_iou, segment, segmented, voted
from semmae.sources import Source
from semmae.vit import make_encoder


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)


def conv(x, state, name, k):
    "A convolution that keeps the size, BatchNorm and ReLU"
    norm = [state[f'{name}.batch_norm.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')]
    return F.batch_norm(F.conv2d(x, state[f'{name}.conv.weight'], padding=k//2), *norm).relu()


def like(x, y):
    return F.interpolate(x, y.shape[2:], mode='bilinear', align_corners=False)


def upernet(levels, s):
    "UPerNet's head as mmsegmentation defines it"
    top = levels[3]
    pooled = [like(conv(F.adaptive_avg_pool2d(top, scale), s, f'psp_modules.{i}.1', 1), top)
              for i, scale in enumerate((1, 2, 3, 6))]
    sums = [conv(torch.cat([top, *pooled], 1), s, 'bottleneck', 3)]
    for i in (2, 1, 0):
        side = conv(levels[i], s, f'lateral_convs.{i}', 1)
        sums.insert(0, side + like(sums[0], side))
    fpn = [conv(x, s, f'fpn_convs.{i}', 3) for i, x in enumerate(sums[:3])] + sums[3:]
    all_levels = conv(torch.cat([like(x, fpn[0]) for x in fpn], 1), s, 'fpn_bottleneck', 3)
    return F.conv2d(all_levels, s['classifier.1.weight'], s['classifier.1.bias'])


def shaken(module):
    "The same with other weights and other statistics"
    gen = generator('weights')
    for p in module.state_dict().values():
        if p.is_floating_point():
            p.copy_(torch.rand(p.shape, generator=gen)*.2 + (.05 if p.ndim == 1 else -.1))
    return module.eval()


def test_the_head_is_the_published_one():
    head, auxiliary = map(shaken, make_heads(12, 20, 5))
    levels = [torch.randn(2, 12, n, n + 2, generator=generator('levels', n)) for n in (28, 14, 7, 3)]
    ours, theirs = head(levels), upernet(levels, head.state_dict())
    assert ours.shape == (2, 5, 28, 30) and ours.std() > .01
    assert torch.allclose(ours, theirs, atol=1e-5)
    s = auxiliary.state_dict()
    theirs = F.conv2d(conv(levels[2], s, 'convs.0', 3), s['classifier.1.weight'], s['classifier.1.bias'])
    assert torch.allclose(auxiliary(levels), theirs, atol=1e-5)


def test_channels_drop_out_before_the_classifier():
    head = make_heads(8, 400, 3)[0].train()
    seen = []
    head.classifier[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head([torch.randn(2, 8, n, n) for n in (16, 8, 4, 2)])
    gone = (seen[0] == 0).flatten(2).all(2).float().mean()
    assert .05 < gone < .15


def test_the_head_of_vit_base_has_as_many_weights_as_published():
    of = lambda n_in, n_out, k: n_in*n_out*k*k + 2*n_out  # a convolution without bias and its BatchNorm
    n, classes = 768, 150
    head = (4*of(n, n, 1) + of(5*n, n, 3) + 3*of(n, n, 1) + 3*of(n, n, 3) + of(4*n, n, 3)
            + (n + 1)*classes)
    neck = 3*(4*n*n + n) + 2*n  # three transposed convolutions and a BatchNorm
    with torch.device('meta'):
        encoder = make_encoder('vit_base_patch16_224', image=(512, 512))
        model = UPerNet(encoder, classes)
        levels = [torch.zeros(2, n, side, side) for side in (128, 64, 32, 16)]
        shapes = [bring(torch.zeros(2, n, 32, 32)).shape for bring in model.neck]
        answers = model(torch.zeros(2, 3, 512, 512))
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(model.head) == head
    assert count(model.neck) == neck
    assert count(model.auxiliary) == of(n, 256, 3) + 257*classes
    assert shapes == [x.shape for x in levels]
    assert [x.shape for x in answers] == [(2, classes, 128, 128), (2, classes, 32, 32)]


def test_levels_are_the_published_blocks():
    encoder = make_encoder(image=(32, 48), patch_size=8, embed_dim=32, depth=12, num_heads=2)
    model, said, given = UPerNet(encoder, 3, channels=8).eval(), {}, {}
    for i, block in enumerate(model.encoder.blocks):
        block.register_forward_hook(lambda module, inputs, out, i=i: said.update({i: out}))
    for i, bring in enumerate(model.neck):
        bring.register_forward_pre_hook(lambda module, inputs, i=i: given.update({i: inputs[0]}))
    model(torch.randn(2, 3, 32, 48, generator=generator('image')))
    for i, block in enumerate((3, 5, 7, 11)):
        assert torch.equal(given[i], said[block][:, 1:].mT.unflatten(2, (4, 6)))


def test_scores_counted_by_hand():
    true = torch.tensor([[[0, 0, 1], [1, VOID, VOID]]], dtype=torch.uint8)
    pred = torch.tensor([[[0, 1, 1], [1, 0, 2]]])
    found = scores_of(confusion(pred, true, 4).sum(0))
    assert found['iou'][:2] == pytest.approx([1/2, 2/3]) and np.isnan(found['iou'][2:]).all()
    assert found['miou'] == pytest.approx((1/2 + 2/3)/2)
    assert found['macc'] == pytest.approx((1/2 + 1)/2) and found['acc'] == pytest.approx(3/4)


def test_counts_are_scikit_learns():
    gen = generator('counts')
    true, pred = (torch.randint(0, 7, (5, 12, 11), generator=gen) for _ in range(2))
    true[torch.rand(true.shape, generator=gen) < .3] = VOID
    known = true != VOID
    assert (confusion(pred, true.byte(), 7).sum(0).numpy()
            == confusion_matrix(true[known], pred[known], labels=range(7))).all()


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 70), st.integers(1, 70))
def test_windows_cover_every_pixel(length, side, stride):
    begins, stride = starts(length, side, min(side, stride)), min(side, stride)
    covered = {k for begin in begins for k in range(begin, begin + side)}
    assert covered >= set(range(length)) and len(set(begins)) == len(begins)
    assert max(begins) + side == max(length, side) and max(np.diff(begins), default=0) <= stride


class Echo(nn.Module):
    "Answers the class that a pixel's colour says"
    def __init__(self, size):
        super().__init__()
        self.encoder = make_encoder(image=size, patch_size=8, embed_dim=32, depth=1, num_heads=2,
                                    stats=((0., 0., 0.), (1/255,)*3))

    def forward(self, x):
        assert x.shape[2:] == self.encoder.patch_embed.img_size
        return -(x[:, :1] - 10*torch.arange(8)[:, None, None]).square()


@pytest.mark.parametrize('size', [(32, 75), (75, 32), (32, 32), (32, 128), (20, 45)])
def test_windows_are_put_together(size):
    "Where nothing is resized, every pixel says its place"
    true = torch.randint(0, 8, size, generator=generator('places', size))
    image = Image.fromarray((10*true).byte().numpy()).convert('RGB')
    model = Echo((32, 32))
    pixels = (10.*true)[None, None].expand(-1, 3, -1, -1)
    for stride in ((16, 16), (32, 32), (5, 7)):
        whole = -(pixels[0, :1] - 10*torch.arange(8)[:, None, None]).square()
        assert torch.allclose(slide(model, pixels, stride), whole)
        if min(size) == 32:
            assert torch.equal(scene_map(model, image, stride), true)
    assert scene_map(model, image).shape == true.shape


def test_where_windows_meet_they_are_averaged():
    "Every window answers the mean of its colours"
    model = Echo((32, 32))
    model.forward = lambda x: x.mean((1, 2, 3), keepdim=True).expand(-1, 1, 32, 32)
    x = torch.zeros(1, 3, 32, 48)
    x[..., 32:] = 1
    assert slide(model, x, (16, 16))[0, 0, [0, 15, 16, 31, 32, 47]].tolist() == [0, 0, .25, .25, .5, .5]


def painted(n=40, size=(60, 90)):
    "Images of four colours in blobs, and their labels; some of no label"
    gen, colours = generator('painted'), torch.tensor([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    blobs = F.interpolate(torch.rand(n, 4, 3, 4, generator=gen), size, mode='bicubic').argmax(1)
    images = colours[blobs].byte().numpy()
    return Source([f'picture {i}' for i in range(n)], ['train']*n, lambda i: Image.fromarray(images[i]), [],
                  maps=lambda i: Image.fromarray(blobs[i].byte().numpy()))


def test_labels_stay_under_their_pixels(monkeypatch):
    monkeypatch.setattr(scenes, 'DISTORT', lambda x: x)
    src, right, wrong, lacking = painted(), [], [], []
    for i in range(40):
        torch.manual_seed(i)
        x, y = random_scene(src.open(i), src.maps(i), (64, 64), (.5, 2.), ((0.,)*3, (1/255,)*3))
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and y.dtype == torch.uint8
        known, colour = y != VOID, torch.cat([x.new_full((1, 64, 64), 99.), x]).argmax(0)
        assert (x[:, ~known] == 0).all()
        right.append((colour == y)[known].float().mean())
        wrong.append((colour.flip(1) == y)[known].float().mean())
        lacking.append(not known.all())
    assert np.mean(right) > .97 and np.mean(wrong) < .9 and {True, False} == set(lacking)


def test_no_class_fills_a_crop_where_another_crop_is_found():
    labels = np.zeros((100, 100), np.uint8)
    labels[:, 60:], labels[:50] = 1, VOID
    for seed in range(20):
        torch.manual_seed(seed)
        piece = labels[random_piece(labels, (60, 60))]
        assert np.bincount(piece[piece != VOID]).max() < .75*(piece != VOID).sum()
    assert random_piece(np.zeros((10, 80), np.uint8), (20, 20))[0] == slice(0, 20)


def small_encoder():
    return make_encoder(image=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2)


OPTIONS = dict(size=(32, 32), steps=11, batch=10, lr=.2, warmup_steps=2, channels=8, drop_path=.2)


class Stop(Exception):
    "The run ends here, as if it had been killed"


def test_a_run_that_goes_on_is_the_run(tmp_path):
    src, encoder = painted(), small_encoder()
    model, rows = learn_scenes(encoder, src, range(40), 4, **OPTIONS, log=lambda line: None)
    assert [r['step'] for r in rows] == [4, 8, 11] and rows[-1]['lr'] == 0
    def stop(line):
        raise Stop
    with pytest.raises(Stop):
        learn_scenes(encoder, src, range(40), 4, **OPTIONS, checkpoint=tmp_path/'state.pt', log=stop)
    said = []
    again, found = learn_scenes(encoder, src, range(40), 4, **OPTIONS, checkpoint=tmp_path/'state.pt',
                                log=said.append)
    assert len(said) == 2 and found == rows
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values()))
    assert rows[-1]['loss'] < rows[0]['loss']


def test_processes_share_a_batch(monkeypatch):
    data = lambda: Scenes(painted(), range(40), 4, UPerNet(small_encoder(), 4, channels=8), (.5, 2.), 8, 6, 0)
    batch = lambda: next(data().batches(2, torch.device('cpu')))
    whole, shares = batch(), []
    monkeypatch.setenv('WORLD_SIZE', '4')
    for rank in range(4):
        monkeypatch.setenv('RANK', f'{rank}')
        shares.append(batch())
    for x, *parts in zip(whole, *shares):
        assert torch.equal(x, torch.cat(parts))


def test_what_cannot_be_learned_from_is_named(monkeypatch):
    src = painted()
    learn = lambda **kw: learn_scenes(small_encoder(), src, range(40), 4, **OPTIONS | kw)
    with pytest.raises(SemmaeError, match='scenes.batch'):
        learn(batch=41)
    src.maps = lambda i: Image.new('L', (90, 60), 4)
    with pytest.raises(SemmaeError, match='^the label map of picture'):
        learn()
    src.maps = lambda i: Image.new('L', (9, 6), 0)
    with pytest.raises(SemmaeError, match='^picture'):
        learn()
    src.maps = None
    with pytest.raises(SemmaeError, match='^picture'):
        learn()
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(SemmaeError, match=r"semmae\[segment\]"):
        learn()


def test_a_coarse_grid_is_a_map():
    src = Source(['a'], ['train'], lambda i: Image.new('RGB', (6, 4)), [],
                 parts=lambda i: np.array([[0, VOID, 2]], np.uint8))
    assert np.asarray(label_map(src, 0)).tolist() == [[0, 0, VOID, VOID, 2, 2]]*4


def test_scores_of_images_are_scores_of_all_their_pixels():
    src, model = painted(12), UPerNet(small_encoder(), 4, channels=8)
    maps = torch.stack([scene_map(model, src.open(i)) for i in range(12)])
    true = torch.stack([torch.from_numpy(np.array(src.maps(i))) for i in range(12)])
    found = scene_scores(model, src, range(12), 4)
    assert found['iou'] == pytest.approx(part_iou(maps, true, 4).tolist(), nan_ok=True)
    assert found['acc'] == pytest.approx((maps == true).float().mean().item())


def test_cells_that_nobody_knows_count_nowhere():
    "Where half of every map is unknown, as much is learned as from the other half"
    src = painted(60, (32, 32))
    images = torch.stack([torch.from_numpy(np.array(src.open(i))) for i in range(60)]).permute(0, 3, 1, 2)
    parts = torch.stack([torch.from_numpy(np.array(src.maps(i))) for i in range(60)])
    hidden = parts.clone()
    hidden[:, :, 16:] = VOID
    train, known = ImageSet(images, parts=hidden), slice(0, 16)
    encoder = small_encoder()
    model, rows = segment(encoder, images, hidden, epochs=2, batch=20, lr=1e-2, warmup_epochs=0)
    maps = [segmented(m, images, (32, 32)) for m in (model, linear_head(encoder, train, train, 4))]
    for m in (*maps, voted(encoder, train, images, 4, (32, 32))):
        assert m.max() < 4 and m.shape == parts.shape
        assert torch.equal(part_iou(m, hidden, 4), part_iou(m[:, :, known], parts[:, :, known], 4))
    assert part_iou(m, parts, 4).mean() > .5, 'the nearest patches tell colours apart'
    assert model.num_classes == 4 and rows[0]['loss'] < .8*torch.tensor(4.).log()


def test_a_long_image_is_no_longer_than_published():
    "Its short side is 512, and its long one no more than 2,048"
    sizes = {(640, 480): (683, 512), (300, 400): (512, 683), (6000, 32): (2048, 11)}
    assert {size: scaled(Image.new('L', size), 512) for size in sizes} == sizes


def test_colours_change_and_classes_do_not():
    image, labels = Image.new('RGB', (32, 32), (200, 100, 50)), Image.new('L', (32, 32), 3)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = random_scene(image, labels, (32, 32), (1, 1), [[.5]*3, [.5]*3])
        assert (y == 3).all() and (x == x[:, :1, :1]).all()
        seen.add(tuple(x[:, 0, 0].tolist()))
    assert len(seen) > 10


def test_the_auxiliary_head_counts_by_its_weight():
    src = Source(['a', 'b'], ['train']*2, lambda i: Image.new('RGB', (16, 16), (90*i, 0, 0)), [],
                 maps=lambda i: Image.new('L', (16, 16), i))
    encoder = make_encoder(image=(16, 16), patch_size=4, embed_dim=16, depth=4, num_heads=2)
    options = dict(size=(16, 16), steps=1, batch=2, warmup_steps=0, channels=8, log=lambda line: None)
    first = lambda weight: learn_scenes(encoder, src, [0, 1], 2, **options, auxiliary=weight)[1][0]['loss']
    none, some, twice = map(first, (0, .4, .8))
    assert none < some and twice - some == pytest.approx(some - none, rel=1e-3)


def test_windows_overlap_by_half_where_nothing_is_said(monkeypatch):
    strides = []
    monkeypatch.setattr(scenes, 'slide', lambda model, x, stride: strides.append(stride) or x[0])
    vit = make_encoder(image=(32, 32), patch_size=8, embed_dim=16, depth=4, num_heads=2)
    scene_map(UPerNet(vit, 3, channels=8), Image.new('RGB', (40, 60)))
    assert strides == [[16, 16]]
