"A folder of images as label maps: interrupted, added to, odd files."
import importlib
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, placeless_encoder
from PIL import Image

from semmae.core import SemmaeError, generator
from semmae.label import label_folder, main
from semmae.parts import BATCH
from semmae.weights import save_encoder

N = 2*BATCH + 20


@pytest.fixture
def encoder():
    return placeless_encoder((16, 16), depth=1)


def make_image(i):
    "A thing of two colours somewhere before a dark ground"
    cells = 20 + torch.randint(0, 15, (8, 8, 3), generator=generator('image', i))
    y, x = torch.randint(1, 4, (2,), generator=generator('place', i)).tolist()
    cells[y:y + 2, x:x + 4, 0] = 240
    cells[y + 2:y + 4, x:x + 4, 1] = 240
    return Image.fromarray(cells.byte().numpy())


@pytest.fixture
def photos(tmp_path):
    for i in range(N):
        file = tmp_path/'photos'/f'{i % 3}'/f'{i:03d}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        make_image(i).resize((40, 24), Image.NEAREST).save(file)
    return tmp_path/'photos'


def same(a, b):
    return list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)


def quiet(*args, **kw):
    return label_folder(*args, **kw, log=lambda line: None)


def test_pictures_and_array_say_the_same(photos, encoder, tmp_path):
    maps = quiet(photos, encoder, tmp_path/'maps')
    assert len(maps) == N and list(maps) == sorted(maps)
    stack = np.load(tmp_path/'maps/maps.npy')
    assert stack.dtype == np.uint8 and stack.shape == (N, 8, 8)
    assert stack.any(), 'there are parts'
    for labels, (name, again) in zip(stack, maps.items(), strict=True):
        with Image.open((tmp_path/'maps'/name).with_suffix('.png')) as picture:
            assert picture.mode == 'P' and picture.size == (40, 24)
            assert np.array_equal(np.asarray(picture)[1::3, 2::5], labels)
        assert np.array_equal(labels, again)
    assert {p.name for p in (tmp_path/'maps').iterdir()} == {
        '0', '1', '2', 'maps.npy', 'maps.json', 'parts.safetensors'}


def test_an_interrupted_run_goes_on(photos, encoder, tmp_path, monkeypatch):
    "With the same maps, and without looking twice at an image whose map is whole"
    want = quiet(photos, encoder, tmp_path/'whole')
    from semmae.learn import Learned
    predict, seen = Learned.predict, []

    def some(self, images):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return predict(self, images)
    monkeypatch.setattr(Learned, 'predict', some)
    with pytest.raises(KeyboardInterrupt):
        quiet(photos, encoder, tmp_path/'maps')
    torn = tmp_path/'maps/maps.a'  # as where a process is killed while it writes
    torn.write_bytes(torn.read_bytes()[:-70])

    def rest(self, images):
        seen.append(len(images))
        return predict(self, images)
    monkeypatch.setattr(Learned, 'predict', rest)
    assert same(quiet(photos, encoder, tmp_path/'maps'), want)
    assert seen == [BATCH, BATCH, 22], 'the two that were torn once more'
    assert same(quiet(photos, encoder, tmp_path/'maps'), want)
    assert len(seen) == 3, 'there was nothing left to do'


def test_images_that_come_and_go(photos, encoder, tmp_path):
    before = quiet(photos, encoder, tmp_path/'maps')
    make_image(999).resize((40, 24)).save(photos/'0/new.png')
    (photos/'0/000.png').unlink()
    make_image(998).resize((16, 16)).save(photos/'1/001.png')  # another image under the same name
    (tmp_path/'maps/2/002.png').unlink()
    after = quiet(photos, encoder, tmp_path/'maps')
    assert after.keys() == before.keys() - {'0/000.png'} | {'0/new.png'} and list(after) == sorted(after)
    kept = after.keys() & before.keys() - {'1/001.png'}
    assert all(np.array_equal(after[k], before[k]) for k in kept)
    assert not np.array_equal(after['1/001.png'], before['1/001.png'])
    assert Image.open(tmp_path/'maps/1/001.png').size == (16, 16)
    assert not (tmp_path/'maps/0/000.png').exists() and (tmp_path/'maps/2/002.png').exists()
    assert np.array_equal(np.load(tmp_path/'maps/maps.npy'), np.stack(list(after.values())))


def test_odd_images(photos, encoder, tmp_path):
    "Of other modes and sizes, on their side; what is no image or is hidden is left out"
    odd = photos/'odd'
    odd.mkdir()
    image = make_image(0).resize((40, 24), Image.NEAREST)
    for mode in ('L', 'RGBA', 'P', 'CMYK'):
        image.convert(mode).save(odd/f'{mode}.tif')
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(odd/'turned.JPG', exif=exif)
    image.save(odd/'tilted.tif', exif=exif)
    make_image(1).resize((7, 90)).save(odd/'thin.webp')
    for name in ('notes.txt', 'notes.pdf', 'clip.mpg'):
        (odd/name).write_text('no image')
    (odd/'album.jpg').mkdir()
    (odd/'gone.jpg').symlink_to(odd/'nowhere.jpg')
    image.save(odd/'.hidden.png')
    maps = quiet(photos, encoder, photos/'maps')  # inside of the folder itself
    assert {k for k in maps if k.startswith('odd')} == {f'odd/{k}' for k in (
        'L.tif', 'RGBA.tif', 'P.tif', 'CMYK.tif', 'turned.JPG', 'tilted.tif', 'thin.webp')}
    for name in ('turned', 'tilted'):
        assert Image.open(photos/f'maps/odd/{name}.png').size == (24, 40)
    assert Image.open(photos/'maps/odd/thin.png').size == (7, 90)
    assert quiet(photos, encoder, photos/'maps').keys() == maps.keys(), 'maps are no images to label'


def test_what_is_wrong_is_named(photos, encoder, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    save_encoder(encoder, tmp_path/'e.safetensors')
    for folder, named in (('none', 'no folder'), ('empty', 'no images')):
        with pytest.raises(SemmaeError, match=named):
            quiet(tmp_path/folder, encoder, tmp_path/'maps')
    make_image(0).save(photos/'0/003.webp')
    with pytest.raises(SemmaeError, match='003.webp'):
        quiet(photos, encoder, tmp_path/'maps')
    (photos/'0/003.webp').unlink()
    quiet(photos, encoder, tmp_path/'maps')
    with pytest.raises(SemmaeError, match='other settings'):
        quiet(photos, encoder, tmp_path/'maps', n_parts=5)
    (photos/'2/zzz.png').write_bytes(b'broken')
    with pytest.raises(SystemExit, match='zzz.png'):
        main([str(photos), '--encoder', str(tmp_path/'e.safetensors'), '--out', str(tmp_path/'others')])
    (photos/'2/zzz.png').unlink()
    main([str(photos), '--encoder', str(tmp_path/'e.safetensors'), '--out', str(tmp_path/'others')])
    others = quiet(photos, encoder, tmp_path/'others')
    assert same(others, quiet(photos, encoder, tmp_path/'maps'))
    Image.fromarray(np.zeros((9, 9), np.int32)).save(photos/'2/zzz.tif')
    with pytest.raises(SystemExit, match='16 bits|8 bits'):
        main([str(photos), '--encoder', str(tmp_path/'e.safetensors'), '--out', str(tmp_path/'deep')])


@pytest.mark.parametrize('changes, named', [
    (dict(encoder='vit_nothing'), '--encoder'), (dict(encoder='./none.pth'), 'none.pth'),
    (dict(image='-16'), '--image'), (dict(image='17'), '17'), (dict(parts='1'), '--parts'),
    (dict(parts='200'), 'parts'), (dict(out='file'), 'file'), (dict(out='file/below'), 'file'),
    (dict(out='broken'), 'broken'), (dict(out='maps_of_ours'), 'maps_of_ours')], ids=str)
def test_arguments_of_the_command_that_are_wrong(photos, encoder, tmp_path, monkeypatch, changes, named):
    monkeypatch.chdir(tmp_path)
    save_encoder(encoder, 'e.safetensors')
    Path('file').write_text('no folder')
    for folder, known in (('broken', '{'), ('maps_of_ours', '{"splits": {}}')):
        Path(folder).mkdir()
        Path(folder, 'maps.json').write_text(known)
    given = dict(encoder='e.safetensors', out='maps') | changes
    with pytest.raises(SystemExit, match=named) as e:
        main(['photos', *[x for k, v in given.items() for x in (f'--{k}={v}',)]])
    assert '\n' not in str(e.value) and 'teacher' not in str(e.value)


@pytest.mark.parametrize('out', ['photos', './photos/../photos', 'link', '.', 'photos/..'])
def test_photos_are_never_written_over(photos, encoder, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path('link').symlink_to('photos')
    before = {p: p.read_bytes() for p in photos.rglob('*.png')}
    for where in (out, Path(out).resolve()):
        with pytest.raises(SemmaeError, match='holds the images'):
            quiet(Path('photos'), encoder, where)
    assert {p: p.read_bytes() for p in photos.rglob('*.png')} == before
    first = quiet(Path('photos'), encoder, Path('photos/maps').resolve())
    assert quiet(photos, encoder, 'photos/maps').keys() == first.keys(), 'maps inside are no photos'


def test_the_command_is_the_one_that_is_installed():
    module, _, name = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['scripts'][
        'semmae-parts'].partition(':')
    assert getattr(importlib.import_module(module), name) is main
