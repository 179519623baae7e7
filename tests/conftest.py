"A clone of the project that a test may run and break."
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
PARALLEL = 'PYTEST_XDIST_WORKER' in os.environ
if PARALLEL:
    os.environ['OMP_NUM_THREADS'] = '1'  # a core for each of pytest's processes, and for what it starts


def pytest_collection_modifyitems(items):
    "Begin with the files that take longest, so that no process is left alone with them in the end"
    items.sort(key=lambda item: item.path.name != 'test_pipeline.py')


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


def wait_for(condition, seconds=60):
    "Return once `condition` holds; fail when it never does"
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(.05)


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
    "The project with its data pulled, through `dvc repro` of `smoke` without the true parts"
    for f in sh(ROOT, 'git ls-files -co --exclude-standard').stdout.splitlines():
        if (ROOT/f).is_file():
            (path/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/f, path/f)
    params = path/'params.yaml'
    params.write_text(params.read_text().replace('profile: tiny', 'profile: smoke', 1)
                      .replace('  true_parts: data\n', '', 1))
    sh(path, 'git init -q && git add -A && git commit -qm start && dvc pull -q data')
    (path/'.git/repro.log').write_text(sh(path, 'dvc repro').stdout)
    sh(path, 'git add -A && git commit -qm smoke')
    return path
