"Two machines, each a network of its own with an address and a name, that train together."
import os
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, environment, make_photos, sh, wait_for

from semmae.pipeline.parts import parts_stage
from semmae.pipeline.processes import GONE
from semmae.pipeline.stages import read_csv
from semmae.pipeline.teacher import teacher_stage
from semmae.pipeline.train import train_stage

A, B = (f'sm{os.getpid()}{k}' for k in 'ab')  # networks of their own beside other runs of this test
MACHINES = {A: '10.77.0.1', B: '10.77.0.2'}


@pytest.fixture
def machines(tmp_path):
    "Network namespaces that are joined by a cable"
    run = lambda command: subprocess.run(command.split(), check=True, capture_output=True)
    hosts = tmp_path/'hosts'
    names = [f'{address} {name}' for name, address in MACHINES.items()]
    hosts.write_text('\n'.join(['127.0.0.1 localhost', *names]))
    with ExitStack() as after:
        try:
            for name in MACHINES:
                run(f'ip netns add {name}')
                after.callback(run, f'ip netns del {name}')
            run(f'ip link add {A}-eth netns {A} type veth peer name {B}-eth netns {B}')
            for name, address in MACHINES.items():
                run(f'ip -n {name} addr add {address}/24 dev {name}-eth')
                for device in 'lo', f'{name}-eth':
                    run(f'ip -n {name} link set {device} up')
            subprocess.run(on(A, hosts, 'true'), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip('networks can be made by root alone')
        yield hosts


def on(name, hosts, *command):
    "The words that run a command on one of the machines, under its name"
    setting = f'hostname {name} && mount --bind {hosts} /etc/hosts && exec "$@"'
    return ['ip', 'netns', 'exec', name, 'unshare', '--uts', '--mount', 'sh', '-c', setting, '-', *command]


@pytest.fixture
def folder(tmp_path):
    "A project on a disk that both see, with what a training looks at"
    path = tmp_path/'project'
    make_photos(path/'data')
    params = (ROOT/'params.yaml').read_text()
    smaller = {'limit: 280': 'limit: 30', 'batch: 64': 'batch: 16', 'labels: [0.2]': 'labels: [0.5]'}
    for old, new in smaller.items():
        params = params.replace(old, new)
    (path/'params.yaml').write_text(params)
    for stage in teacher_stage, parts_stage:
        stage(path, 'smoke')
    return path


def start(folder, hosts, name):
    "Run the command of the chapter on one of the machines"
    command = on(name, hosts, 'python', '-m', 'semmae.pipeline.machines', 'train', 'smoke', '--nnodes=2',
                 '--nproc-per-node=1', '--rdzv-backend=c10d', f'--rdzv-endpoint={A}:29400')
    with open(folder/name, 'w') as log:
        return subprocess.Popen(command, cwd=folder, env=environment(ROOT), stdout=log, stderr=log,
                                start_new_session=True)


def losses(folder):
    return [row['loss'] for row in read_csv(folder/'runs/train/semmae/loss.csv')]


def test_two_machines(machines, folder):
    "One that is lost ends the run in a sentence; the run goes on, and learns what one process learns"
    params = folder/'params.yaml'
    params.write_text(params.read_text().replace('epochs: 3\n', 'epochs: 100\n', 1))
    train_stage(folder, 'smoke')
    alone = losses(folder)
    shutil.rmtree(folder/'runs/train')
    shutil.rmtree(folder/'runs/unfinished')

    first, second = (start(folder, machines, name) for name in MACHINES)
    wait_for(lambda: 'epoch 2/100' in (folder/A).read_text(), 180)
    for pid in sh(folder, f'ip netns pids {B}').stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    assert first.wait(120) != 0 and second.wait(60) != 0
    assert (folder/A).read_text().splitlines()[-1] == GONE

    again = [start(folder, machines, name) for name in MACHINES]
    assert [run.wait(300) for run in again] == [0, 0], (folder/A).read_text()
    said = [line for line in (folder/A).read_text().splitlines() if line.startswith('epoch')]
    assert 'epoch 1/100' not in '\n'.join(said) and 'epoch 100/100' in said[-1]
    assert losses(folder) == pytest.approx(alone, rel=1e-2)
