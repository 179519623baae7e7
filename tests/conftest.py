"A clone of the project that a test may run and break; images and encoders that several files use."
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
PARALLEL = 'PYTEST_XDIST_WORKER' in os.environ
os.environ['PYTHONPATH'] = f'{ROOT}:{ROOT}/tests'  # of processes that tests start
os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the same on every machine
if PARALLEL:
    os.environ['OMP_NUM_THREADS'] = '1'  # a core for each of pytest's processes, and for what it starts

import torch  # which looks at that when it loads
from PIL import Image

from semmae.core import generator
from semmae.vit import make_encoder

torch.cpu._is_avx512_bf16_supported = lambda: False  # the same numbers on every processor


def pytest_collection_modifyitems(items):
    "Begin with the files that take longest, so that no process is left alone with them in the end"
    items.sort(key=lambda item: item.path.name != 'test_pipeline.py')


def random_images(n, h, w):
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator('images'))


def small_encoder(**kw):
    return make_encoder(**dict(image=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2) | kw)


def painted(truth, noise=15):
    "Images whose parts have colours of their own, a cell of two by two pixels"
    colours = torch.tensor([[20, 20, 20], [240, 120, 120], [120, 240, 120], [120, 120, 240]])
    cells = colours[truth] + noise*torch.randn(*truth.shape, 3, generator=generator('noise'))
    return cells.clamp(0, 255).byte().movedim(3, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def placeless_encoder(image, depth):
    "An encoder that looks at such cells and does not know where they lie"
    vit = small_encoder(image=image, patch_size=2, depth=depth)
    vit.pos_embed.data.zero_()
    return vit.eval()


def make_photos(folder):
    "Twenty blue and twenty red images of 16 by 16, in a folder each"
    for c in ('blue', 'red'):
        (folder/c).mkdir(parents=True)
        for i, few in enumerate(torch.randint(100, (20, 4, 4, 3), generator=generator(c), dtype=torch.uint8)):
            few[..., 0 if c == 'red' else 2] += 150
            Image.fromarray(few.numpy()).resize((16, 16)).save(folder/c/f'{i}.png')


def environment(cwd):
    "The environment of a command in a clone: its own semmae, an author for git, a shell that stays"
    return {**os.environ, 'PYTHONPATH': str(cwd), 'MPLBACKEND': 'agg', 'SHELL': '/bin/sh',
            'GIT_AUTHOR_NAME': 'a test', 'GIT_AUTHOR_EMAIL': 'test@example.org',
            'GIT_COMMITTER_NAME': 'a test', 'GIT_COMMITTER_EMAIL': 'test@example.org'}


def sh(cwd, command, ok=True):
    "Run a shell command in a clone; what it printed and its exit code"
    done = subprocess.run(command, shell=True, cwd=cwd, env=environment(cwd), timeout=600,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    assert done.returncode == 0 or not ok, f'{command}\n{done.stdout}'
    return done


def wait_for(condition, seconds=60, pause=.05):
    "Return once `condition` holds; fail when it never does"
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(pause)


TRUTH = torch.zeros(40, 8, 8, dtype=torch.long)  # a thing of three parts in every image
for k in range(40):
    y, x = torch.randint(1, 3, (2,), generator=generator('place', k)).tolist()
    for part in range(3):
        TRUTH[k, y + part*5//3:y + (part + 1)*5//3, x:x + 4] = part + 1


@pytest.fixture
def planted():
    return placeless_encoder((16, 16), depth=1), painted(TRUTH)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='session')
def project(tmp_path_factory):
    "A clone at `smoke` after `dvc repro`, made once; each of pytest's processes has a copy of its own"
    base = tmp_path_factory.getbasetemp()
    whole = (base.parent if PARALLEL else base)/'whole'
    with FileLock(f'{whole}.lock'):
        if not whole.exists():
            make_smoke(base/'making').rename(whole)
    path = tmp_path_factory.mktemp('clone')/'smoke'
    shutil.copytree(whole, path, symlinks=True)
    return path


def make_smoke(path):
    "The project with its data pulled, through `dvc repro` of `smoke` with fewer trainings"
    for f in sh(ROOT, 'git ls-files -co --exclude-standard').stdout.splitlines():
        if (ROOT/f).is_file():
            (path/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/f, path/f)
    params = path/'params.yaml'
    params.write_text(params.read_text().replace('profile: tiny', 'profile: smoke', 1)
                      .replace('  random: data\n', '', 1)
                      .replace('  semmae_400: data\n  mae_400: data\n', '', 1)
                      .replace('tuned: [semmae_400, mae_400, untrained]', 'tuned: [semmae]', 1))
    sh(path, 'git init -q && git add -A && git commit -qm start && dvc pull -q data')
    (path/'.git/repro.log').write_text(sh(path, 'dvc repro').stdout)
    sh(path, 'git add -A && git commit -qm smoke')
    return path
