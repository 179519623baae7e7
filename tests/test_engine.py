"One process or several, interrupted or not: the same result."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, free_port, wait_for
from worker import IMAGES, MAPS, cramped, killed, label, parent, ranked, starved, tune, work

from semmae.core import SemmaeError, read_json
from semmae.pipeline.params import read_yaml
from semmae.pipeline.processes import launch
from semmae.train import run_key

workers = get_context('forkserver')
workers.set_forkserver_preload(['worker'])


def result(folder):
    return torch.load(folder/'weights.pt'), [r['loss'] for r in read_json(folder/'history.json')]


def alone(folder, target=work, **options):
    "The same in a process of its own"
    p = workers.Process(target=target, args=[folder], kwargs=options)
    p.start()
    return p


def several(folder, n, target=work, **options):
    "The same in several processes"
    port = free_port()
    ranks = [workers.Process(target=ranked, args=[k, n, port, target, folder, options]) for k in range(n)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join()
    assert not any(p.exitcode for p in ranks)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run in one process"
    folder = tmp_path_factory.mktemp('whole')
    work(folder)
    return folder


def same(a, b, tolerance):
    (wa, la), (wb, lb) = result(a), result(b)
    worst = max((wa[k] - wb[k]).abs().max().item() for k in wa)
    assert worst <= tolerance and max(abs(x - y) for x, y in zip(la, lb, strict=True)) <= tolerance, worst


@pytest.mark.parametrize('n, options', [(3, {}), (2, dict(accumulate=3)), (1, dict(accumulate=4)),
                                        (2, dict(accumulate=2, stream=True))])
def test_processes_and_turns_give_what_one_gives(whole, tmp_path, n, options):
    "But for the order of sums; 3 processes do not divide a batch of 16, nor 16 the 70 images"
    several(tmp_path, n, **options)
    same(tmp_path, whole, 5e-4)  # Adam makes much of the last digits of small gradients


def test_a_share_of_the_patches_is_the_same_in_several(tmp_path):
    for n, turns in ((1, 1), (2, 2)):
        several(tmp_path/f'{n}', n, visible=.5, visible_by='foreground', accumulate=turns)
    same(tmp_path/'2', tmp_path/'1', 5e-4)


def test_gradients_are_as_long_as_those_of_one(tmp_path):
    "Which an optimiser notices that does not scale them"
    for n, turns in ((1, 1), (2, 2)):
        several(tmp_path/f'{n}', n, optimizer=dict(opt='sgd', momentum=.9), lr=1., accumulate=turns)
    same(tmp_path/'2', tmp_path/'1', 1e-4)


def test_processes_learn_from_labels_what_one_learns(tmp_path):
    several(tmp_path/'one', 1, tune)
    several(tmp_path/'two', 2, tune)
    same(tmp_path/'two', tmp_path/'one', 1e-5)


def test_part_maps_are_made_in_shards_by_several_processes(tmp_path):
    "Of four shards the first is left by a run that stopped; two processes make the others"
    made = lambda: [int(f.read_text()) for f in sorted(tmp_path.glob('made*'))]
    label(tmp_path, stop_after=1)
    assert made() == [1] and len(list(tmp_path.glob('parts.key/train-*.npy'))) == 1
    (tmp_path/'parts.old').mkdir()  # of other images, or other settings
    several(tmp_path, 2, label)
    assert made() == [2, 1]
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path/f'maps{rank}.pt'), IMAGES[:, 0, ::8, ::8])
    assert [f.name for f in tmp_path.glob('parts.*')] == ['parts.key']


def test_killed_at_any_moment_and_run_again(tmp_path):
    "Nine times, three of them while a checkpoint is being written: bit-identical weights in the end"
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    work(tmp_path/'a', epochs=80)
    rng, state, caught = random.Random(0), tmp_path/'b/state.pt', 0
    since = lambda: state.exists() and state.stat().st_mtime_ns
    writing = lambda: list(state.parent.glob('.*state.pt'))
    for k in range(9):
        before, p = since(), alone(tmp_path/'b', epochs=80)
        wait_for(lambda: since() != before, pause=.001)
        if k % 3:
            time.sleep(rng.uniform(0, .05))
        else:
            wait_for(writing, pause=.0001)
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL, 'the run is too short to be killed so often'
        caught += bool(writing())
    assert caught, 'no checkpoint was ever caught half written'
    work(tmp_path/'b', epochs=80)
    assert not writing()
    same(tmp_path/'a', tmp_path/'b', 0)


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path):
    "Under torchrun: one rank killed, nobody left; run again, the weights of an uninterrupted run of two"
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    several(tmp_path/'a', 2, epochs=30)
    run = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                            '--nproc-per-node=2', ROOT/'tests/worker.py', tmp_path/'b',
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
    several(tmp_path/'b', 2, epochs=30)
    same(tmp_path/'a', tmp_path/'b', 0)


def test_a_full_disk_is_named_and_keeps_the_last_good_checkpoint(whole, tmp_path):
    "A real one: the process may write no file as large as a checkpoint"
    work(tmp_path, epochs=4, stop_after=2)
    good = (tmp_path/'state.pt').read_bytes()
    alone(tmp_path, cramped, size=len(good)//2).join()
    error = (tmp_path/'error').read_text()
    assert 'state.pt' in error and 'epoch 2' in error
    assert (tmp_path/'state.pt').read_bytes() == good and not list(tmp_path.glob('.*'))
    work(tmp_path)
    same(tmp_path, whole, 0)


@pytest.mark.parametrize('other', [
    dict(lr=2e-2), dict(seed=1), dict(masking=dict(name='blend', ratio=.75, gamma=3.)), dict(ema=.9),
    dict(heads=4), dict(image=(64, 16)), dict(model=dict(heads=4)), dict(model=dict(norm_pixels=False)),
    dict(model=dict(kind='cross', share=.5))])
def test_a_checkpoint_of_other_parameters_is_not_continued(whole, tmp_path, other):
    (tmp_path/'fresh').mkdir()
    shutil.copy(whole/'state.pt', tmp_path)
    work(tmp_path, **other)
    work(tmp_path/'fresh', **other)
    same(tmp_path, tmp_path/'fresh', 0)


def test_nor_of_other_data_or_code(tmp_path):
    key = lambda images, maps, module='pretrain', **kw: run_key(module, images, maps, lr=1., **kw)
    images, maps = IMAGES.clone(), MAPS.clone()
    images[3, 0, 5, 5] += 1
    maps[3, 1, 1] += 1
    keys = {key(IMAGES, MAPS), key(images, MAPS), key(IMAGES, maps), key(IMAGES, None)}
    assert key(IMAGES.clone(), MAPS.clone()) in keys
    for module in 'masking', 'mae', 'attend', 'show':
        shutil.copytree(ROOT/'semmae', tmp_path/module)
        with open(tmp_path/f'{module}/{module}.py', 'a') as f:
            f.write('# another\n')
        keys.add(key(IMAGES, MAPS, code=tmp_path/module))
    assert len(keys) == 7, 'an edited kernel is other code, an edited plot is not'
    shutil.copytree(ROOT/'semmae', tmp_path/'again')
    with open(tmp_path/'again/segment.py', 'a') as f:
        f.write('# another\n')
    changed = {module for module in ('pretrain', 'finetune', 'segment', 'teacher')
               if key(IMAGES, MAPS, module) != key(IMAGES, MAPS, module, code=tmp_path/'again')}
    assert changed == {'segment'}, 'which fine-tuning does not run'


def test_a_stream_gives_what_memory_gives(whole, tmp_path):
    "Bit for bit, and after an interruption"
    work(tmp_path, stream=True, stop_after=2)
    work(tmp_path, stream=True)
    same(tmp_path, whole, 0)


def test_where_there_is_no_memory_the_batch_is_named(tmp_path):
    alone(tmp_path, starved, room=2**28).join()
    error = (tmp_path/'error').read_text()
    assert 'pretrain.batch' in error and 'pretrain.accumulate' in error


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path/'state.pt').write_bytes(b'half a file')
    with pytest.raises(SemmaeError, match='state.pt'):
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


def test_a_rank_ends_with_its_parent(tmp_path):
    p, child = alone(tmp_path, parent), tmp_path/'child'
    wait_for(lambda: child.exists() and child.read_text())
    running = Path(f'/proc/{child.read_text()}/exe')
    assert running.exists()
    p.kill()
    wait_for(lambda: not running.exists(), 20)


def test_where_a_process_is_killed_memory_is_named():
    with pytest.raises(SemmaeError, match='pretrain.accumulate'):
        launch(killed, processes=2)


def test_a_mistake_in_several_processes_is_one(tmp_path):
    with pytest.raises(SemmaeError, match='^[^\n]*params.yaml[^\n]*$'):
        launch(read_yaml, str(tmp_path/'params.yaml'), processes=2)
