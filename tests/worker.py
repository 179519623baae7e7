"A small pretraining that tests run, kill and run again: python worker.py FOLDER '{\"epochs\": 3}', alone or under torchrun."
import json
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image

from semmae.core import SemmaeError, generator, write_json
from semmae.data import Source, Stream
from semmae.mae import MAE
from semmae import train
from semmae.train import join, pretrain, world
from semmae.vit import make_encoder

IMAGES = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8, generator=generator('images'))
STREAM = Stream(Source([f'{i}' for i in range(70)], ['train']*70, lambda i: Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy()), []), range(70), (32, 32))
MAPS = torch.randint(0, 5, (70, 9, 7), dtype=torch.uint8, generator=generator('maps'))


class Stop(Exception): "The run ends here, as if it had been killed"


def work(folder, stop_after=None, float32=False, stream=False, heads=2, image=(32, 32), model={}, **options):
    "Train from whatever is in the folder; weights and losses go into it"
    if float32: train.autocast = lambda device: nullcontext()  # bfloat16 would hide the order of sums in its rounding
    folder, lines = Path(folder), []
    torch.set_num_threads(1)
    join(torch.device('cpu'))
    def log(line):
        lines.append(line)
        if len(lines) == stop_after: raise Stop
    mae = MAE(make_encoder(image=image, patch_size=8, embed_dim=32, depth=1, num_heads=heads), **dict(width=32, depth=1, heads=2) | model)
    settings = dict(masking=dict(name='blend', ratio=.75), epochs=4, batch=16, lr=1e-2, warmup_epochs=1, checkpoint=folder/('state.pt' if world()[0] == 0 else 'another machine/state.pt'))
    try: history = pretrain(mae, STREAM if stream else IMAGES, MAPS, log=log, **settings | options)
    except Stop: return
    if world()[0] == 0:
        torch.save(mae.state_dict(), folder/'weights.pt')
        write_json(folder/'history.json', history)


def cramped(folder, size):
    "The same where no file may be larger than `size` bytes"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try: work(folder)
    except SemmaeError as e: (Path(folder)/'error').write_text(str(e))


def starved(folder, room):
    "The same where no more than `room` bytes can be had, with a batch that wants more"
    used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    mae = MAE(make_encoder(image=(32, 32), patch_size=2, embed_dim=32, depth=4, num_heads=2), width=512, depth=2, heads=2)
    try: pretrain(mae, IMAGES, epochs=1, batch=70, warmup_epochs=0)
    except SemmaeError as e: (Path(folder)/'error').write_text(str(e))


if __name__ == '__main__': work(sys.argv[1], **json.loads(sys.argv[2]))
