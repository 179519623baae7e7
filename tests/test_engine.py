"One process or several, interrupted or not: the same result."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, wait_for
from worker import IMAGES, MAPS, cramped, killed, starved, tune, work

from semmae.core import SemmaeError, read_json
from semmae.pipeline.processes import launch, run_process
from semmae.pipeline.train import train_stage
from semmae.train import run_key

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node']
workers = get_context('forkserver')
workers.set_forkserver_preload(['worker'])


def result(folder):
    return torch.load(folder/'weights.pt'), [r['loss'] for r in read_json(folder/'history.json')]


def torchrun(folder, n, **options):
    return subprocess.run([*TORCHRUN, str(n), ROOT/'tests/worker.py', folder, json.dumps(options)],
                          env=environment(ROOT) | {'OMP_NUM_THREADS': '1'},
                          capture_output=True, text=True, timeout=300)


def alone(folder, target=work, **options):
    "The same in a process of its own, killed or not; its exit code"
    p = workers.Process(target=target, args=[folder], kwargs=options)
    p.start()
    return p


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run in one process"
    folder = tmp_path_factory.mktemp('whole')
    work(folder)
    return folder


@pytest.fixture(scope='module')
def exact(tmp_path_factory):
    "The same in float32"
    folder = tmp_path_factory.mktemp('exact')
    p = alone(folder, float32=True)
    p.join()
    return folder


def same(a, b, tolerance):
    (wa, la), (wb, lb) = result(a), result(b)
    worst = max((wa[k] - wb[k]).abs().max().item() for k in wa)
    assert worst <= tolerance and max(abs(x - y) for x, y in zip(la, lb, strict=True)) <= tolerance, worst


@pytest.mark.parametrize('n, options', [(2, {}), (3, {}), (2, dict(accumulate=3)), (1, dict(accumulate=4)),
                                        (2, dict(accumulate=2, stream=True))])
def test_processes_and_turns_give_what_one_gives(exact, tmp_path, n, options):
    "In float32 but for the order of sums; 3 processes do not divide a batch of 16, nor 16 the 70 images"
    done = torchrun(tmp_path, n, float32=True, **options)
    assert done.returncode == 0, done.stderr
    same(tmp_path, exact, 1e-4)


def test_processes_learn_from_labels_what_one_learns(tmp_path):
    alone(tmp_path/'one', tune, float32=True).join()
    done = torchrun(tmp_path/'two', 2, what='tune', float32=True)
    assert done.returncode == 0, done.stderr
    same(tmp_path/'two', tmp_path/'one', 1e-4)


@pytest.fixture(scope='module')
def long(tmp_path_factory):
    "An uninterrupted run of many short epochs, every one with a checkpoint"
    folder = tmp_path_factory.mktemp('long')
    work(folder, epochs=250)
    return folder


def test_killed_at_any_moment_and_run_again(long, tmp_path):
    "Twenty-one times, seven of them while a checkpoint is being written: bit-identical weights in the end"
    rng, kills = random.Random(0), []
    while True:
        p = alone(tmp_path, epochs=250)
        writing = lambda: list(tmp_path.glob('.*state.pt'))
        if len(kills) < 21:
            if len(kills) % 3 == 0:
                wait_for(lambda: writing() or not p.is_alive())
            else:
                p.join(rng.uniform(.02, .5))
            assert p.is_alive(), 'the run is too short to be killed so often'
            os.kill(p.pid, signal.SIGKILL)
        p.join()
        if p.exitcode == 0:
            break
        kills.append(bool(writing()))
        for f in writing():
            f.unlink()
    assert len(kills) == 21 and sum(kills) >= 4, 'no checkpoint was ever caught half written'
    same(tmp_path, long, 0)


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path):
    "Under torchrun: one rank killed, nobody left; run again, the weights of an uninterrupted run of two"
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    assert torchrun(tmp_path/'a', 2, epochs=30).returncode == 0
    run = subprocess.Popen([*TORCHRUN, '2', ROOT/'tests/worker.py', tmp_path/'b',
                            json.dumps(dict(epochs=30))],
                           env=environment(ROOT) | {'OMP_NUM_THREADS': '1'},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path/'b/state.pt').exists())
    ranks = [int(p.name) for p in Path('/proc').glob('[0-9]*')
             if f'worker.py\0{tmp_path}/b' in (p/'cmdline').read_text(errors='replace')
             and int(p.name) != run.pid]
    os.kill(max(ranks), signal.SIGKILL)
    assert run.wait(120) != 0
    wait_for(lambda: not any(Path(f'/proc/{r}/exe').exists() for r in ranks))
    assert torchrun(tmp_path/'b', 2, epochs=30).returncode == 0
    same(tmp_path/'a', tmp_path/'b', 0)


def test_a_full_disk_is_one_sentence_and_keeps_the_last_good_checkpoint(whole, tmp_path):
    "A real one: the process may write no file as large as a checkpoint"
    work(tmp_path, epochs=4, stop_after=2)
    good = (tmp_path/'state.pt').read_bytes()
    p = workers.Process(target=cramped, args=[tmp_path, len(good)//2])
    p.start()
    p.join()
    assert (tmp_path/'error').read_text().endswith(
        'make room on the disk and run again, it goes on after epoch 2')
    assert (tmp_path/'state.pt').read_bytes() == good and not list(tmp_path.glob('.*'))
    work(tmp_path)
    same(tmp_path, whole, 0)


@pytest.mark.parametrize('other', [
    dict(lr=2e-2), dict(seed=1), dict(masking=dict(name='blend', ratio=.75, gamma=3.)), dict(ema=.9),
    dict(heads=4), dict(image=(64, 16)), dict(model=dict(heads=4)), dict(model=dict(norm_pixels=False)),
    dict(model=dict(kind='cross', share=.5))])
def test_a_checkpoint_of_other_parameters_is_not_continued(tmp_path, other):
    work(tmp_path, epochs=4, stop_after=3)
    work(tmp_path, **other)
    (tmp_path/'fresh').mkdir()
    work(tmp_path/'fresh', **other)
    same(tmp_path, tmp_path/'fresh', 0)


def test_nor_of_other_data_or_code(tmp_path):
    key = lambda images, maps, **kw: run_key('pretrain', images, maps, lr=1., **kw)
    images, maps = IMAGES.clone(), MAPS.clone()
    images[3, 0, 5, 5] += 1
    maps[3, 1, 1] += 1
    keys = {key(IMAGES, MAPS), key(images, MAPS), key(IMAGES, maps), key(IMAGES, None)}
    assert key(IMAGES.clone(), MAPS.clone()) in keys
    for module in 'masking', 'attend', 'show':
        shutil.copytree(ROOT/'semmae', tmp_path/module)
        with open(tmp_path/f'{module}/{module}.py', 'a') as f:
            f.write('# another\n')
        keys.add(key(IMAGES, MAPS, code=tmp_path/module))
    assert len(keys) == 6, 'an edited kernel is other code, an edited plot is not'


def test_a_stream_gives_what_memory_gives(whole, tmp_path):
    "Bit for bit, and after an interruption"
    work(tmp_path, stream=True, stop_after=2)
    work(tmp_path, stream=True)
    same(tmp_path, whole, 0)


def test_no_memory_is_one_sentence(tmp_path):
    p = workers.Process(target=starved, args=[tmp_path, 2**28])
    p.start()
    p.join()
    assert (tmp_path/'error').read_text() == (
        'there is no memory for batches of 70: lower `pretrain.batch`, or raise `pretrain.accumulate`')


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path/'state.pt').write_bytes(b'half a file')
    with pytest.raises(SemmaeError, match='state.pt cannot be read .* remove it to start afresh'):
        work(tmp_path)


def test_an_average_of_the_weights_is_the_result(whole, tmp_path):
    work(tmp_path, ema=.5)
    (average, _), (last, _) = result(tmp_path), result(whole)
    assert (all(v.isfinite().all() for v in average.values())
            and any(not torch.equal(average[k], last[k]) for k in last))


@pytest.mark.parametrize('options', [
    dict(optimizer=dict(opt='lamb')), dict(optimizer=dict(opt='sgd', momentum=.9)), dict(clip=.1),
    dict(compile='aot_eager')])
def test_what_is_chosen_by_value(tmp_path, options):
    "Other optimisers of timm's, clipping, compilation: the loss falls"
    work(tmp_path, **options)
    losses = result(tmp_path)[1]
    assert losses[-1] < losses[0]


def test_a_rank_ends_with_its_parent(monkeypatch):
    called = []
    monkeypatch.setattr('semmae.pipeline.processes.world', lambda: (0, 2))
    monkeypatch.setattr('semmae.pipeline.processes.die_with_parent', lambda: called.append('watches'))
    run_process(lambda *args: called.append('trains'))
    assert called == ['watches', 'trains']


def test_a_process_that_is_killed_is_one_sentence(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT/'tests'))
    with pytest.raises(SemmaeError, match=r'^one of the processes was killed, .*`pretrain.accumulate`$'):
        launch(killed, processes=2)


def test_a_mistake_in_several_processes_is_one_sentence(tmp_path):
    with pytest.raises(SemmaeError, match=r'params.yaml is missing: run from the project.s folder$'):
        launch(train_stage, str(tmp_path), processes=2)
