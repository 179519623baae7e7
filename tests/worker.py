"A small pretraining that tests run, kill and run again: python worker.py FOLDER '{\"epochs\": 3}'."
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from semmae.core import SemmaeError, check, generator, write_json
from semmae.mae import MAE
from semmae.sources import Source, Stream
from semmae.teacher import distil
from semmae.pipeline import maps
from semmae.pipeline.processes import run_process
from semmae.pretrain import pretrain
from semmae.segment import segment
from semmae.train import join, world
from semmae.vit import make_encoder

torch.cpu._is_avx512_bf16_supported = lambda: False  # sums of other orders differ much in bfloat16

IMAGES = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8, generator=generator('images'))
STREAM = Stream(Source([f'{i}' for i in range(70)], ['train']*70,
                       lambda i: Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy()), []),
                range(70), (32, 32))
MAPS = torch.randint(0, 5, (70, 9, 7), dtype=torch.uint8, generator=generator('maps'))


class Stop(Exception):
    "The run ends here, as if it had been killed"


def setting(folder, stop_after=None):
    "A process of its own kind, alone or among others: where its state goes, and a log that ends it"
    torch.set_num_threads(1)
    join(torch.device('cpu'))
    lines = []
    def log(line):
        lines.append(line)
        if len(lines) == stop_after:
            raise Stop
    return dict(log=log, checkpoint=folder/('state.pt' if world()[0] == 0 else 'another machine/state.pt'))


def keep(folder, model, history):
    if world()[0] > 0:
        return
    torch.save(model.state_dict(), folder/'weights.pt')
    write_json(folder/'history.json', history)


def work(folder, stop_after=None, stream=False, heads=2, image=(32, 32), model={}, **options):
    "Train from whatever is in the folder; weights and losses go into it"
    folder = Path(folder)
    here = setting(folder, stop_after)
    mae = MAE(make_encoder(image=image, patch_size=8, embed_dim=32, depth=1, num_heads=heads),
              **dict(width=32, depth=1, heads=2) | model)
    settings = dict(masking=dict(name='blend', ratio=.75), epochs=4, batch=16, lr=1e-2, warmup_epochs=1)
    try:
        keep(folder, mae, pretrain(mae, STREAM if stream else IMAGES, MAPS, **here | settings | options))
    except Stop:
        pass


def teach(folder, stop_after=None, **options):
    "The same with a teacher"
    folder = Path(folder)
    here = setting(folder, stop_after)
    encoder = make_encoder(image=(24, 24), patch_size=8, embed_dim=32, depth=1, num_heads=2)
    try:
        keep(folder, encoder, distil(encoder, IMAGES, **here | dict(
            epochs=4, batch=16, lr=2e-3, warmup_epochs=4, n_words=16, n_small=1) | options)[1:])
    except Stop:
        pass


def tune(folder):
    "The same with labels: the part of every cell"
    here = setting(folder)
    encoder = make_encoder(image=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2)
    options = dict(epochs=3, batch=16, lr=1e-2, warmup_epochs=1, drop_path=0)
    keep(folder, *segment(encoder, IMAGES, MAPS, **options, **here))


def label(folder, stop_after=None):
    "Make the maps of the images, twenty a shard, and count in how many shards this process made some"
    folder, done = Path(folder), []
    setting(folder)
    maps.SHARD = 20
    def cells(images):
        if len(done) == stop_after:
            raise Stop
        done.append(len(images))
        return images[:, 0, ::8, ::8]
    try:
        found = maps.in_shards(cells, IMAGES, maps.shards_folder(folder/'parts', 'key'), 'train')
        torch.save(found, folder/f'maps{world()[0]}.pt')
    except Stop:
        pass
    (folder/f'made{world()[0]}').write_text(f'{len(done)}')


def ranked(rank, n, port, target, folder, options):
    "One of several processes, as torchrun starts them"
    os.environ |= dict(RANK=f'{rank}', WORLD_SIZE=f'{n}', MASTER_ADDR='127.0.0.1', MASTER_PORT=f'{port}')
    target(folder, **options)


def cramped(folder, size):
    "The same where no file may be larger than `size` bytes"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        work(folder)
    except SemmaeError as e:
        (Path(folder)/'error').write_text(str(e))


def starved(folder, room):
    "The same where no more than `room` bytes can be had, with a batch that wants more"
    used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    mae = MAE(make_encoder(image=(32, 32), patch_size=2, embed_dim=32, depth=4, num_heads=2),
              width=512, depth=2, heads=2)
    try:
        pretrain(mae, IMAGES, epochs=1, batch=70, warmup_epochs=0)
    except SemmaeError as e:
        (Path(folder)/'error').write_text(str(e))


def parent(folder):
    "A process whose child is one of two that train, and writes its id once it does"
    def train(*args):
        (Path(folder)/'child').write_text(str(os.getpid()))
        time.sleep(60)
    if os.fork() == 0:
        os.environ['WORLD_SIZE'] = '2'
        run_process(train)
    time.sleep(60)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def answer(call, log):
    "What `side_by_side` calls in a process of its own"
    log(f'asked {call}')
    check(call != 'wrong', 'that is wrong')
    if call == 'die':
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.get_num_threads()


if __name__ == '__main__':
    work(sys.argv[1], **json.loads(sys.argv[2]))
