"Attention in one piece, in Triton's interpreter: against PyTorch's own, its gradient, compiled."
import importlib.util
import os
import subprocess
import sys

import pytest

PEERS = ('''
import torch
from torch.library import opcheck
from torch.nn import functional as F
from semmae.attend import TILES, attend, keys_of

def theirs(qkv, heads): '''
'return F.scaled_dot_product_attention(*qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4))'
'''.transpose(1, 2).flatten(2)

torch.manual_seed(0)
for n in (1, 16, 17, 64, 65, 129, 256):
    qkv = 3*torch.randn(2, n, 3*2*16)
    for x in (qkv, qkv + 20):  # scores of thousands: the largest is taken off before powers
        x = x.requires_grad_()
        along = torch.randn(2, n, 32)
        pairs = [(y, *torch.autograd.grad(y, x, along)) for y in (theirs(x, 2), attend(x, 2)[0])]
        for a, b in zip(*pairs): assert (a - b).norm() < 1e-3*a.norm(), (n, (a - b).norm()/a.norm())
print({keys_of(n) for n in range(1, 257)} == set(TILES))
x = torch.randn(2, 10, 96, requires_grad=True)
print(set(opcheck(torch.ops.semmae.attend.default, (x, 2)).values()))
step = lambda x: attend(x.sin(), 2)[0].square().sum()
one, other = (torch.autograd.grad(f(x), x)[0] '''
"for f in (step, torch.compile(step, backend='aot_eager', dynamic=False)))"
'''
print(torch.equal(one, other))
''')


@pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='there is no Triton for this machine')
def test_it_says_what_pytorch_says():
    run = subprocess.run([sys.executable, '-c', PEERS], env=os.environ | dict(TRITON_INTERPRET='1'),
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split('\n')[:3] == ['True', "{'SUCCESS'}", 'True']
