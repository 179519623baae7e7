"Every command of the README runs; its first two are what CI runs."
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from conftest import ROOT, free_port, sh, wait_for
from transformers import ViTMAEForPreTraining

from semmae.core import generator, read_json
from semmae.weights import load_encoder

README = (ROOT/'README.md').read_text()
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```', README, re.S | re.M)
lines_of = lambda language: [line.split('  #')[0].strip() for k, block in BLOCKS if k == language
                             for line in block.splitlines() if line.strip()]
BASH, PYTHON = lines_of('bash'), [block for k, block in BLOCKS if k == 'python']
LARGE = lines_of('')  # commands for GPUs
SETUP = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[dev]' && dvc pull data && "


def small(command):
    "The same command for the small profile that the clone is at"
    return command.replace('profiles.tiny', 'profiles.smoke')


def shrink_cifar10(project):
    "Make the profile `cifar10` and its study small, with images in CIFAR-10's format"
    images = torch.randint(256, (600, 32, 32, 3), generator=generator(0), dtype=torch.uint8).numpy()
    np.savez(project/'cifar.npz', images=images, labels=np.arange(600) % 10)
    params = yaml.safe_load((project/'params.yaml').read_text())
    params['profiles']['cifar10'] = params['profiles']['smoke'] | dict(
        data=dict(source='cifar.npz', size=[32, 32]))
    params['studies']['cifar10'] = dict(profile='cifar10', results='runs/rows.jsonl',
                                        rows=[dict(entries=['random'], seeds=[0])])
    (project/'params.yaml').write_text(yaml.safe_dump(params))

def test_the_two_commands():
    assert BASH[:2] == [SETUP + 'dvc repro', SETUP + 'OMP_NUM_THREADS=1 nbdev_test && pytest']
    run = (ROOT/'.ci/run').read_text()
    assert 'README.md' in run and "endswith('pytest')" in run


def test_what_it_links_to_is_there():
    links = re.findall(r'\]\(([^)#]+)', README)
    assert [x for x in links if not x.startswith('http') and not (ROOT/x).exists()] == []


# test_pipeline.py runs these
ELSEWHERE = ['dvc metrics diff', 'dvc exp run -S profiles.tiny.pretrain.masking.ratio=0.6']
SHORT = [c for c in BASH[2:] if not c.startswith(('jupyter', 'nbdev_test')) and c not in ELSEWHERE]

@pytest.mark.parametrize('command', SHORT)
def test_command(project, command, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    if 'photos' in command:
        (tmp_path/'photos').mkdir()
        for i, few in enumerate(torch.randint(256, (100, 5, 5, 3), generator=generator(0),
                                              dtype=torch.uint8)):
            Image.fromarray(few.numpy()).resize((70, 64)).save(tmp_path/'photos'/f'{i}.jpg')
        command += ' teacher'  # test_profiles.py runs the other stages without labels
    if 'profile=cifar10' in command:
        shrink_cifar10(project)
        # nothing after it knows of the source
        command += ' -S +trainings.random=data teacher'
    if 'gamma_3' in command:
        command += ' exported'  # which checks the training that is new, and notes its code
    sh(project, small(command))
    if 'gamma_3' in command:
        assert (project/'runs/code/train/gamma_3.json').is_file()
    if 'photos' in command:
        assert read_json(project/'runs/metrics/teacher.json')['images'] == 10
    if 'profile=cifar10' in command:
        assert read_json(project/'runs/metrics/teacher.json')['images'] == 100
    if 'photos' in command or 'profile=' in command:
        sh(project, 'git checkout -q . && dvc checkout -q --force')
    sh(project, 'git checkout -q . && git clean -qfd')

def test_jupyterlab_opens(project):
    port, command = free_port(), next(c for c in BASH if c.startswith('jupyter'))
    lab = subprocess.Popen([*command.split(), '--no-browser', '--allow-root', '--ip=127.0.0.1',
                            f'--port={port}', '--IdentityProvider.token=test'],
                           cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           start_new_session=True)
    def answer(page):
        try:
            return urllib.request.urlopen(f'http://127.0.0.1:{port}/{page}?token=test', timeout=30).read()
        except urllib.error.URLError:
            return None
    try:
        wait_for(lambda: answer('lab'))
        assert b'# core' in answer('api/contents/00_core.ipynb')
    finally:
        os.killpg(lab.pid, signal.SIGKILL)


@pytest.mark.parametrize('command', LARGE, ids=['study', 'benchmark', 'machines'])
def test_command_for_a_gpu(project, command):
    "As it stands, with what needs a GPU or hours made small"
    smaller = {"'nbs/studies/gpu.json', checkout='../mae'": "'runs/gpu.json', size='toy', blocks=['parts']",
               '--nnodes=2 --nproc-per-node=8': '--nnodes=1 --nproc-per-node=2',
               'HOST:29400': f'127.0.0.1:{free_port()}', 'train cifar10': 'train smoke'}
    small = command
    for old, new in smaller.items():
        small = small.replace(old, new)
    if 'study' in command:
        shrink_cifar10(project)
    sh(project, small)
    if 'study' in command:
        assert len((project/'runs/rows.jsonl').read_text().splitlines()) == 1
    else:
        assert small != command
    sh(project, 'git checkout -q . && git clean -qfd')


def test_python(project, tmp_path):
    code = PYTHON[0].replace("'data', size", "'data', limit=60, size")
    code = code.replace('epochs=5', 'epochs=2, batch=20')
    (tmp_path/'example.py').write_text(code)
    sh(project, f'python {tmp_path}/example.py')
    encoder = load_encoder(project/'runs/mine.safetensors')
    assert encoder.embed_dim == 128
    theirs = ViTMAEForPreTraining.from_pretrained(project/'runs/theirs')
    assert torch.equal(theirs.vit.embeddings.cls_token, encoder.cls_token)
    sh(project, 'git clean -qfd')

def test_a_new_strategy_is_found_by_its_name():
    from semmae.masking import STRATEGIES, find_strategy
    try:
        exec(PYTHON[1], {})
        parts = torch.tensor([[[0, 1, 0, 2], [0, 0, 0, 3]]])
        keep, hidden = find_strategy('foreground', ratio=.5, background=0)(parts, generator(0))
        assert {1, 3, 7} < set(hidden[0].tolist()) and len(hidden[0]) == 4
    finally:
        STRATEGIES.pop('foreground', None)
