"A study's runs: each once, a mistake in one is no harm to others, tables from lines."
import json

import pytest
import torch
import yaml
from PIL import Image

from semmae.ablate import ahead, by_seed, read_rows, run_rows
from semmae.core import generator
from semmae.parts import parts_stage

PROFILE = dict(seed=0, processes=1, data=dict(source='photos', size=[16, 16], channels=3, limit=None), teacher=None, parts=dict(source='grid', n_parts=4, grid=[2, 2]),
               encoder=dict(name='vit_tiny_patch16_224', patch_size=4, embed_dim=16, depth=1, num_heads=2), decoder=dict(width=16, depth=1, heads=2),
               pretrain=dict(masking=dict(name='random', ratio=.5), epochs=1, batch=8, lr=1e-3, warmup_epochs=1, crop_scale=[.5, 1.]), probe=dict(labels=[]),
               finetune=dict(labels=1., epochs=1, batch=8, warmup_epochs=1), segment=dict(labels=1.))


@pytest.fixture
def root(tmp_path):
    for c in ('blue', 'red'):
        (tmp_path/'photos'/c).mkdir(parents=True)
        for i, few in enumerate(torch.randint(100, (20, 4, 4, 3), generator=generator(c), dtype=torch.uint8)):
            few[..., 0 if c == 'red' else 2] += 150
            Image.fromarray(few.numpy()).resize((16, 16)).save(tmp_path/'photos'/c/f'{i}.png')
    ablations = dict(inter=dict(pretrain=dict(masking=dict(name='inter'))), patch=dict(encoder=dict(patch_size=5)), same=dict(seed=0))
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(dict(profile='p', profiles=dict(p=PROFILE), ablations=ablations)))
    return tmp_path


def test_rows_are_run_once_and_a_mistake_in_one_harms_no_other(root, capsys):
    parts_stage(root)
    file, rows = root/'rows.jsonl', [dict(entry='main', seed=0), dict(entry='patch', seed=0), dict(entry='inter', seed=1, times=2), dict(entry='same', seed=0), dict(entry='scratch', seed=0, tuned=True)]
    run_rows(rows, file, root, 'p', side_by_side=1)
    said, found = capsys.readouterr().out, read_rows(file)
    assert list(found) == [('main', 0, 1, False), ('inter', 1, 2, False), ('scratch', 0, 1, True)]
    assert 'cannot be cut into patches of 5' in said and 'same is left out: it would be the main run' in said
    inter, scratch = found['inter', 1, 2, False], found['scratch', 0, 1, True]
    assert inter['config']['pretrain']['epochs'] == 2 and inter['config']['pretrain']['masking'] == dict(name='inter', ratio=.5) and inter['images'] == 4
    assert 0 <= scratch['finetune'] <= 1 and 'mae' not in scratch and len({r['checkpoint'] for r in found.values()}) == 3
    before = file.read_text()
    run_rows([dict(entry='main', seed=0), dict(entry='scratch', seed=0, tuned=True)], file, root, 'p', side_by_side=1)
    assert file.read_text() == before


def test_only_seeds_that_both_have_are_compared(tmp_path):
    lines = [dict(entry=e, seed=s, x=x) for e, s, x in (('a', 0, 5.), ('a', 1, 7.), ('b', 1, 4.), ('b', 2, 9.))] + [dict(entry='a', seed=1, times=2, x=100.)]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in lines))
    rows = read_rows(tmp_path/'rows.jsonl')
    a, b, twice = (by_seed(rows, lambda r: r['x'], e, **kw) for e, kw in (('a', {}), ('b', {}), ('a', dict(times=2))))
    assert ahead(a, b)[0] == 3 and ahead(twice, b)[0] == 96
