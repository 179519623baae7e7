"Readers of published sets, on imitations of all of them."
import io
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Flowers102, OxfordIIITPet
from imitations import AIRCRAFT, BIRDS, CARS, FLOWERS, IMITATIONS, PETS, SYNSETS, flowers, pets, shards, shown

from semmae.core import SemmaeError
from semmae.datasets import DOWNLOADS, SETS
from semmae.images import VOID
from semmae.parts import read_cub
from semmae.sources import decode, load_images, open_path, open_source

NUMBERED = [f'{c:04d}' for c in range(4)]
SPECIES = [f'{c:04d} {name[4:]}' for c, name in enumerate(BIRDS)]
CLASSES = dict(imagenet=SYNSETS, shards=NUMBERED, cub=BIRDS, cars=CARS, aircraft=AIRCRAFT, flowers=FLOWERS,
               pets=PETS, inat2017=SPECIES, inat2018=[f'{c:04d} {c}' for c in range(4)], inat2019=SPECIES,
               ade20k=None)
COUNTS = dict(aircraft=(24, 16, 16), flowers=(20, 16, 20))  # the others: 40 to learn from, and 16
TITLES = dict(cub='CUB-200-2011', cars='Stanford Cars', aircraft='FGVC-Aircraft', flowers='Flowers-102',
              pets='Oxford Pets', inat2018='iNaturalist 2018', ade20k='SceneParse150')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The path of every imitation, for tests that only read"
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in IMITATIONS.items()}


@pytest.mark.parametrize('name', IMITATIONS)
def test_labels_and_splits_are_those_of_the_images(made, name):
    src, classes = open_path(made[name]), CLASSES[name]
    seen = [shown(src.open(i)) for i in range(len(src.names))]
    assert [split for _, split in seen] == src.splits
    assert src.labels == (classes and [classes[c] for c, _ in seen])
    assert len(seen) == len(set(src.names)) == len(set(src.keys)) == 56
    counts = COUNTS.get(name, (36, 4, 16))  # once val is held out; of two splits the second is test
    src = open_source(made[name])
    assert [src.splits.count(s) for s in ('train', 'val', 'test')] == list(counts)


@pytest.mark.parametrize('name', IMITATIONS)
def test_what_is_held_out_does_not_hang_on_the_place(made, name, tmp_path):
    copy = shutil.copytree(made[name], tmp_path/'elsewhere'/made[name].name)
    assert open_source(copy).splits == open_source(made[name]).splits


@pytest.mark.parametrize('name', IMITATIONS)
def test_odd_images_are_decoded(made, name):
    "Grey, CMYK, a PNG called JPEG, one of 32 pixels and one of 6000"
    src = open_source(made[name])
    opened = [src.open(i) for i in range(len(src.names))]
    assert {'L', 'CMYK'} <= {im.mode for im in opened} and {'JPEG', 'PNG'} <= {im.format for im in opened}
    assert {(32, 32), (6000, 24)} <= {im.size for im in opened}
    assert min(decode(src, i, (16, 16)).std((1, 2)).min() for i in range(len(opened))) > 1


def test_shards_hold_what_the_folder_holds(made):
    both = []
    for name, stem in ('imagenet', lambda n: Path(n).stem), ('shards', lambda n: n.rpartition(':')[2]):
        data, = load_images(made[name], ['test'], size=(24, 24), stream=name == 'shards')
        order = sorted(range(len(data)), key=lambda i: stem(data.names[i]))
        both.append((data.images[torch.tensor(order)], data.targets['class'][order],
                     [stem(data.names[i]) for i in order]))
    (images, targets, names), (others, numbers, keys) = both
    assert torch.equal(images, others) and torch.equal(targets, numbers) and names == keys


def pack(path, **files):
    with tarfile.open(path, 'w:gz' if path.name.startswith('gz') else 'w') as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace('_', '.'))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg():
    file = io.BytesIO()
    Image.new('RGB', (8, 8)).save(file, 'JPEG')
    return file.getvalue()


@pytest.mark.parametrize('name, files, named', [
    ('x-train-1.tar', dict(a_jpg=jpeg(), a_cls=b'cat'), 'x-train-1.tar:a '),
    ('x-train-1.tar', dict(a_jpg=jpeg(), a_json=b'{"label": '), 'x-train-1.tar:a '),
    ('x-train-1.tar', dict(a_jpg=jpeg(), b_cls=b'1'), 'x-train-1.tar:b '),
    ('x-train-1.tar', dict(a_jpg=jpeg()), 'x-train-1.tar:a '),
    ('x-test-1.tar', dict(a_jpg=jpeg(), a_cls=b'-1'), 'x-test-1.tar:a '),
    ('x-1.tar', dict(a_jpg=jpeg(), a_cls=b'1'), 'x-1.tar '),
    ('gz-train-1.tar', dict(a_jpg=jpeg(), a_cls=b'1'), 'gz-train-1.tar ')])
def test_broken_shards_are_refused(tmp_path, name, files, named):
    path = shards(tmp_path)
    pack(path/name, **files)
    with pytest.raises(SemmaeError, match=named):
        open_source(path)


@pytest.mark.parametrize('more', [0, 100])
def test_a_shard_that_breaks_off_is_refused(tmp_path, more):
    "Between two samples, or later"
    shard = shards(tmp_path)/'imagenet1k-train-0001.tar'
    with tarfile.open(shard) as tar:
        fourth = [m.offset for m in tar if m.name.endswith('.json')][3]  # every sample begins with one
    shard.write_bytes(shard.read_bytes()[:fourth + more])
    with pytest.raises(SemmaeError, match='imagenet1k-train-0001.tar'):
        open_source(shard.parent)


def test_shards_without_splits_and_labels(tmp_path):
    for n in range(2):
        pack(tmp_path/f'{n:05d}.tar', **{f'{n}{k}_JPEG': jpeg() for k in range(10)})
    train, val, test = load_images(tmp_path, size=(8, 8))
    assert (len(train), len(val), len(test)) == (16, 2, 2) and not train.targets


def test_keypoints_of_birds(made):
    "One in the middle, and one that is cut off where the image is not square"
    data, = load_images(made['cub'], ['train'], size=(32, 32))
    points = read_cub(made['cub'], data.names, (32, 32))
    assert points.shape == (36, 15, 3) and (points[:, 0] == torch.tensor([.5, .5, 1])).all()
    square = torch.tensor([Image.open(name).size == (32, 32) for name in data.names])
    assert torch.equal(points[:, 1, 2] == 1, square) and (points[:, 2:] == 0).all()


@pytest.mark.parametrize('name', ['flowers', 'pets'])
def test_our_lists_are_those_of_torchvision(made, name, monkeypatch):
    monkeypatch.setattr('torchvision.datasets.flowers102.check_integrity', lambda *args: True)
    src, theirs = open_path(made[name]), []
    for split in dict(flowers=('train', 'val', 'test'), pets=('trainval', 'test'))[name]:
        data = dict(flowers=Flowers102, pets=OxfordIIITPet)[name](made[name].parent, split)
        theirs += [(np.asarray(image), data.classes[label]) for image, label in data]
    assert len(theirs) == len(src.names)
    for i, (image, label) in enumerate(theirs):
        assert label.lower() == src.labels[i].replace('_', ' ').lower()
        assert (np.asarray(src.open(i).convert('RGB')) == image).all()


LISTED = dict(cub=f'images/{BIRDS[0]}', cars='cars_test', aircraft='data/images', flowers='jpg',
              pets='images', inat2018='train_val2018/Birds/2', ade20k='annotations/training').items()
DESCRIBING = [(name, file) for name in TITLES if name != 'ade20k' for file in SETS[TITLES[name]][1]]


@pytest.mark.parametrize('name, file', [*LISTED, *DESCRIBING])
def test_what_is_missing_is_named_and_where_to_get_it(tmp_path, name, file):
    path = IMITATIONS[name](tmp_path)
    gone = path/file
    if gone.is_dir():
        gone = sorted(f for f in gone.iterdir() if f.suffix in ('.jpg', '.png'))[3]
    gone.unlink()
    with pytest.raises(SemmaeError) as error:
        open_source(path)
    assert str(gone) in str(error.value) and SETS[TITLES[name]][0] in str(error.value)


@pytest.mark.parametrize('name, file', [('cub', 'image_class_labels.txt'), ('inat2018', 'val2018.json'),
                                        ('flowers', 'setid.mat'), ('pets', 'annotations/test.txt'),
                                        ('cars', 'devkit/cars_meta.mat'), ('aircraft', 'data/variants.txt')])
def test_a_file_that_breaks_off_is_told_in_one_sentence(tmp_path, name, file):
    path = IMITATIONS[name](tmp_path)
    text = (path/file).read_bytes()
    (path/file).write_bytes(text[:len(text)//2])
    with pytest.raises(SemmaeError, match=SETS[TITLES[name]][0].replace('?', '.')):
        open_source(path)


def test_other_numbers_than_the_official_ones_are_told(made, capsys, monkeypatch):
    open_source(made['cub'])
    told = capsys.readouterr().out
    assert all(k in told for k in ('CUB-200-2011', '5994', '40')) and told.count('\n') == 1
    for key, n in dict(train=40, test=16, classes=4).items():
        monkeypatch.setitem(SETS['CUB-200-2011'][2], key, n)
    open_source(made['cub'])
    assert not capsys.readouterr().out


def test_the_table_has_the_splits_of_every_set(made):
    for name, title in TITLES.items():
        src = open_path(made[name])
        assert set(SETS[title][2]) == {*src.splits, *(['classes'] if src.labels else [])}


def test_torchvision_wants_its_name_for_a_folder(made, tmp_path):
    for name in 'aircraft', 'cars':
        path = shutil.copytree(made[name], tmp_path/f'my {name}')
        with pytest.raises(SemmaeError, match=made[name].name):
            open_source(path)


def test_maps_of_ade20k(made):
    src = open_path(made['ade20k'])
    for i in range(len(src.names)):
        k = int(src.names[i][-12:-4]) - 1
        labels, image = np.asarray(src.maps(i)), src.open(i)
        upper, lower = np.split(labels, 2)
        assert labels.shape == image.size[::-1] and (upper == shown(image)[0]).all()
        assert (lower == (149 if k % 2 else VOID)).all()
    train, = load_images(made['ade20k'], ['train'], size=(16, 16))
    assert train.parts.shape == (36, 4, 4) and set(train.parts.unique().tolist()) == {0, 1, 2, 3, 149, VOID}


def own_maps(folder, labels='labels'):
    for kind in ('images', labels):
        for town in 'ab':
            (folder/kind/town).mkdir(parents=True)
    for i in range(20):
        Image.new('RGB', (8, 8)).save(folder/f'images/{"ab"[i % 2]}/{i}.jpeg')
        map_ = Image.fromarray(np.uint8([[0, 1], [7, VOID]])).convert('P' if i % 2 else 'L')
        if i % 2:
            map_.putpalette(list(range(255, -1, -1))*3)
        map_.save(folder/f'{labels}/{"ab"[i % 2]}/{i}.png')


@pytest.mark.parametrize('labels', ['labels', 'annotations'])
def test_maps_of_ones_own_keep_their_numbers(tmp_path, labels):
    "Whatever their palette; a list of classes beside them does not make them birds"
    own_maps(tmp_path, labels)
    (tmp_path/'classes.txt').write_text('sky\n')
    src = open_source(tmp_path)
    assert Counter(src.splits) == dict(train=16, val=2, test=2) and src.labels is None
    for i in range(20):
        assert np.asarray(src.maps(i)).tolist() == [[0, 1], [7, VOID]]


def test_maps_that_cannot_be_read_are_named(tmp_path):
    own_maps(tmp_path)
    bad = tmp_path/'labels/a/0.png'
    Image.new('RGB', (2, 2)).save(bad)
    for _ in range(2):
        with pytest.raises(SemmaeError, match=str(bad)):
            load_images(tmp_path, size=(8, 8))
        bad.write_bytes(b'no image')
    bad.unlink()
    with pytest.raises(SemmaeError, match=str(bad)):
        open_source(tmp_path)


def test_a_name_downloads_once(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    downloaded = []
    def download(root, download):
        downloaded.append(flowers(root))
    monkeypatch.setitem(DOWNLOADS, 'flowers102', (download, *DOWNLOADS['flowers102'][1:]))
    both = [open_source('torchvision/flowers102') for _ in range(2)]
    assert downloaded == [tmp_path/'semmae/flowers-102'] and both[0].labels == both[1].labels
    pets(tmp_path/'semmae')
    assert set(open_source('torchvision/pets').labels) == set(PETS)


def test_a_download_that_fails_says_where_to_get_the_set(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    def fail(root, download):
        raise OSError('no network')
    for name in 'flowers102', 'aircraft', 'pets':
        monkeypatch.setitem(DOWNLOADS, name, (fail, *DOWNLOADS[name][1:]))
        with pytest.raises(SemmaeError, match=SETS[DOWNLOADS[name][2]][0]):
            open_source(f'torchvision/{name}')


@pytest.mark.parametrize('name, named', [
    ('torchvision/cars', SETS['Stanford Cars'][0]), ('torchvision/x', 'pets'), ('hfids/a/b', 'hfds/'),
    ('wds/imagenet', 'shards')])
def test_names_that_cannot_be_opened(name, named):
    with pytest.raises(SemmaeError, match=named):
        open_source(name)


class HuggingFace:
    "What timm makes of a dataset of Hugging Face's: a column of labels, and images that take time to read"
    label_key, read = 'label', ()

    def __init__(self, labels):
        self.reader, self.dataset = self, {'label': labels}

    def __len__(self):
        return len(self.dataset['label'])

    def __getitem__(self, i):
        self.read += i,
        return io.BytesIO(jpeg()), self.dataset['label'][i]


@pytest.mark.parametrize('splits, last, counts', [
    (dict(train=[0, 1]*10, test=[-1]*6, validation=[1, 0, 1]), 'validation', (18, 2, 3)),
    (dict(train=[0, 1]*10, test=[0, 1]*2, validation=[1, 0, 1]), 'test', (18, 2, 4)),
    (dict(train=[0, 1]*10, validation=[0, 1]), 'validation', (18, 2, 2)),
    (dict(train=[0, 1]*10, test=[-1]*6), 'train', (16, 2, 2))])
def test_labels_of_hugging_face_are_read_without_the_images(tmp_path, monkeypatch, splits, last, counts):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    made = {split: HuggingFace(labels) for split, labels in splits.items()}
    def create(name, root, split):
        if split not in made:
            raise ValueError(f'Unknown split {split}')
        return made[split]
    monkeypatch.setattr('semmae.sources.create_dataset', create)
    src = open_source('hfds/a/b')
    assert [src.splits.count(s) for s in ('train', 'val', 'test')] == list(counts)
    assert src.labels[:2] == ['0000', '0001'] and not any(data.read for data in made.values())
    assert src.open(len(src.names) - 1).size == (8, 8)
    assert made[last].read == (len(made[last]) - 1,)
