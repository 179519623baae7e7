"Small imitations of published sets of images: their folders, names, annotation files and odd images"
import io
import json
import tarfile
from functools import partial

import numpy as np
from PIL import Image
from scipy.io import savemat

GREY, CMYK, PNG, SMALL, WIDE = 3, 11, 17, 23, 29  # the images of a set that are odd
SPLITS = 'train', 'val', 'test'
COLOURS = np.array([[k >> b & 1 for b in range(3)] for k in range(1, 5)])*200  # of different brightness, too
SYNSETS = 'n01440764', 'n01443537', 'n01484850', 'n01491361'
BIRDS = '001.Black_footed_Albatross', '002.Laysan_Albatross', '003.Sooty_Albatross', '004.Groove_billed_Ani'
CARS = 'AM General Hummer SUV 2000', 'Acura RL Sedan 2012', 'Acura TL Sedan 2012', 'Acura TL Type-S 2008'
AIRCRAFT = '707-320', '727-200', 'A300B4', 'F/A-18'
FLOWERS = 'pink primrose', 'hard-leaved pocket orchid', 'canterbury bells', 'sweet pea'
PETS = 'Abyssinian', 'american_bulldog', 'american_pit_bull_terrier', 'basset_hound'


def rows(**counts):
    "Number, split, class, and number in the class of each image: so many of four classes in a split"
    return [(k, *row) for k, row in enumerate(
        (split, c, i) for split, n in counts.items() for c in range(4) for i in range(n))]


def size_of(k):
    return {SMALL: (32, 32), WIDE: (6000, 24)}.get(k, (60, 48))


def photo(k, split, c):
    "The bytes of an image: the upper half shows its class, the lower half its split"
    (w, h), rng = size_of(k), np.random.default_rng(k)
    pixels = np.repeat(COLOURS[[c, SPLITS.index(split)]], h//2, 0)[:, None] + rng.integers(0, 40, (h, w, 1))
    img, file = Image.fromarray(pixels.astype(np.uint8)), io.BytesIO()
    img = img.convert({GREY: 'L', CMYK: 'CMYK'}.get(k, 'RGB'))
    img.save(file, 'PNG' if k == PNG else 'JPEG', quality=90)
    return file.getvalue()


def shown(img):
    "Which class and which split an image shows"
    colours = [Image.new('RGB', (1, 1), tuple(colour)).convert(img.mode).convert('RGB').getpixel((0, 0))
               for colour in COLOURS + 20]
    halves = np.split(np.asarray(img.convert('RGB')).astype(float), 2)
    c, split = (int(np.abs(colours - half.mean((0, 1))).sum(1).argmin()) for half in halves)
    return c, SPLITS[split]


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_lines(file, lines):
    write(file, ''.join(f'{line}\n' for line in lines))


def imagenet(folder):
    for k, split, c, i in rows(train=10, val=4):
        name = f'{SYNSETS[c]}_{100 + i}' if split == 'train' else f'ILSVRC2012_val_{k:08d}'
        write(folder/'imagenet'/split/SYNSETS[c]/f'{name}.JPEG', photo(k, split, c))
    return folder/'imagenet'


def shards(folder):
    "The images of `imagenet`, in the order of nothing; some labels as text, some as JSON"
    path, images = folder/'imagenet-wds', rows(train=10, val=4)
    write(path/'_info.json', '{}')
    write(path/'README.md', '# ImageNet\n')
    for name, first, step, split in (('train-0000', 0, 2, 'train'), ('train-0001', 1, 2, 'train'),
                                     ('validation-00', 0, 1, 'val')):
        own = [row for row in images if row[1] == split][first::step]
        with tarfile.open(path/f'imagenet1k-{name}.tar', 'w') as tar:
            for k, split, c, i in sorted(own, key=lambda row: row[0]*7 % 40):
                key = f'{SYNSETS[c]}_{100 + i}' if split == 'train' else f'ILSVRC2012_val_{k:08d}'
                label = dict(json=json.dumps({'label': c, 'filename': f'{key}.JPEG'}))
                if k % 3:
                    label['cls'] = str(c)
                for kind, data in (label | dict(jpg=photo(k, split, c))).items():
                    info = tarfile.TarInfo(f'{key}.{kind}')
                    data = data if isinstance(data, bytes) else data.encode()
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def cub(folder):
    "Keypoint 1 in the middle, 2 in the upper left corner, the others not visible"
    path, images = folder/'CUB_200_2011', rows(train=10, test=4)
    order = np.random.default_rng(0).permutation(len(images)) + 1
    names = {order[k]: f'{BIRDS[c]}/{BIRDS[c][4:]}_{k:04d}_{i}.jpg' for k, _, c, i in images}
    of = {order[k]: (split, c) for k, split, c, _ in images}
    for k, split, c, _ in images:
        write(path/'images'/names[order[k]], photo(k, split, c))
    write_lines(path/'images.txt', [f'{n} {names[n]}' for n in sorted(names)])
    write_lines(path/'image_class_labels.txt', [f'{n} {of[n][1] + 1}' for n in sorted(of)])
    write_lines(path/'train_test_split.txt', [f"{n} {int(of[n][0] == 'train')}" for n in sorted(of)])
    write_lines(path/'classes.txt', [f'{c + 1} {name}' for c, name in enumerate(BIRDS)])
    write_lines(path/'bounding_boxes.txt', [f'{n} 0.0 0.0 32.0 24.0' for n in sorted(names)])
    size = {order[k]: size_of(k) for k, *_ in images}
    points = lambda n: [(size[n][0]/2, size[n][1]/2, 1), (1., 1., 1)] + [(0., 0., 0)]*13
    write_lines(path/'parts/part_locs.txt', [f'{n} {p} {x} {y} {seen}' for n in sorted(names)
                                             for p, (x, y, seen) in enumerate(points(n), 1)])
    write_lines(path/'parts/parts.txt', [f'{p} part {p}' for p in range(1, 16)])
    return path


def cars(folder):
    path, images = folder/'stanford_cars', rows(train=10, test=4)
    kinds = [(name, object) for name in ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'fname')]
    (path/'devkit').mkdir(parents=True)
    for split, file in ('train', 'devkit/cars_train_annos.mat'), ('test', 'cars_test_annos_withlabels.mat'):
        own = [row for row in images if row[1] == split]
        own = [own[j] for j in np.random.default_rng(0).permutation(len(own))]
        for n, (k, _, c, _) in enumerate(own, 1):
            write(path/f'cars_{split}'/f'{n:05d}.jpg', photo(k, split, c))
        found = [(1, 1, 32, 24, c + 1, f'{n:05d}.jpg') for n, (_, _, c, _) in enumerate(own, 1)]
        savemat(path/file, {'annotations': np.array([found], kinds)})
    savemat(path/'devkit/cars_meta.mat', {'class_names': np.array([CARS], object)})
    return path


def aircraft(folder):
    path = folder/'fgvc-aircraft-2013b'
    images = [(f'{7654321*(k + 1) % 10**7:07d}', k, *rest) for k, *rest, _ in rows(train=6, val=4, test=4)]
    for name, k, split, c in images:
        write(path/'data/images'/f'{name}.jpg', photo(k, split, c))
    for level, plural in dict(variant='variants', family='families', manufacturer='manufacturers').items():
        write_lines(path/f'data/{plural}.txt', AIRCRAFT)
        for split in (*SPLITS, 'trainval'):
            write_lines(path/f'data/images_{level}_{split}.txt',
                        [f'{name} {AIRCRAFT[c]}' for name, _, s, c in sorted(images) if s in split])
    write_lines(path/'data/images_box.txt', [f'{name} 1 1 32 24' for name, *_ in sorted(images)])
    write(path/'README', 'FGVC-Aircraft\n')
    return path


def flowers(folder):
    path, images = folder/'flowers-102', rows(train=5, val=4, test=5)
    order = np.random.default_rng(0).permutation(len(images)) + 1
    labels = np.zeros((1, len(images)), np.uint8)
    for k, split, c, _ in images:
        write(path/f'jpg/image_{order[k]:05d}.jpg', photo(k, split, c))
        labels[0, order[k] - 1] = c + 1
    savemat(path/'imagelabels.mat', {'labels': labels})
    savemat(path/'setid.mat', {key: np.uint16([[order[k] for k, s, *_ in images if s == split]])
                               for split, key in zip(SPLITS, ('trnid', 'valid', 'tstid'))})
    return path


def pets(folder):
    "One image more that is odd: a GIF that is called JPEG"
    path, lines = folder/'oxford-iiit-pet', dict(train=[], test=[])
    for k, split, c, i in rows(train=10, test=4):
        name = f"{PETS[c]}_{i + 1 + 100*(split == 'test')}"
        write(path/f'images/{name}.jpg', photo(k, split, c))
        if k == 1:
            Image.open(path/f'images/{name}.jpg').quantize(256).save(path/f'images/{name}.jpg', 'GIF')
        (path/'annotations/trimaps').mkdir(parents=True, exist_ok=True)
        Image.new('L', size_of(k), 2).save(path/f'annotations/trimaps/{name}.png')
        lines[split].append(f'{name} {c + 1} {1 if PETS[c][0].isupper() else 2} {c + 1}')
    write(path/'images/Abyssinian_100.mat', b'')
    write_lines(path/'annotations/trainval.txt', lines['train'])
    write_lines(path/'annotations/test.txt', lines['test'])
    write_lines(path/'annotations/list.txt', ['#Image CLASS-ID SPECIES BREED ID', *sum(lines.values(), [])])
    return path


def inat(year, folder):
    "Classes without names of their own in 2018"
    path, data = folder/f'inat{year}', {}
    top = 'train_val_images' if year == 2017 else f'train_val{year}'
    for k, split, c, _ in rows(train=10, val=4):
        part = data.setdefault(split, dict(info={'year': year}, images=[], licenses=[], annotations=[]))
        folders = f'Aves/{BIRDS[c][4:]}' if year == 2017 else f'Birds/{c}'
        name = f'{top}/{folders}/{k*0x9e3779b97f4a7c15 % 2**128:032x}.jpg'
        write(path/name, photo(k, split, c))
        part['images'].append(dict(id=1000 - k, file_name=name, width=60, height=48, license=1))
        part['annotations'].insert(0, dict(id=1000 - k, image_id=1000 - k, category_id=c))
    for split, part in data.items():
        part['categories'] = [dict(id=c, name=str(c) if year == 2018 else BIRDS[c][4:], supercategory='Aves')
                              for c in (2, 0, 3, 1)]
        write(path/f'{split}{year}.json', json.dumps(part))
    return path


def ade20k(folder):
    "The upper half of an image is of its class; the lower half is of none, or of the last class"
    path = folder/'ADEChallengeData2016'
    for k, split, c, _ in rows(train=10, val=4):
        long = dict(train='training', val='validation')[split]
        name, (w, h) = f'{long}/ADE_{split}_{k + 1:08d}', size_of(k)
        write(path/f'images/{name}.jpg', photo(k, split, c))
        labels = np.repeat(np.uint8([c + 1, 150*(k % 2)]), h//2)[:, None].repeat(w, 1)
        (path/f'annotations/{long}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(path/f'annotations/{name}.png')
    write_lines(path/'objectInfo150.txt', ['Idx\tRatio\tTrain\tVal\tName', '1\t0.1576\t11664\t1172\twall'])
    write_lines(path/'sceneCategories.txt', [f'ADE_train_{k:08d} bathroom' for k in range(1, 41)])
    return path


IMITATIONS = dict(imagenet=imagenet, shards=shards, cub=cub, cars=cars, aircraft=aircraft, flowers=flowers,
                  pets=pets, inat2017=partial(inat, 2017), inat2018=partial(inat, 2018),
                  inat2019=partial(inat, 2019), ade20k=ade20k)
