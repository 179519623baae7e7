"A study's rows: each once, none that would not finish, mistakes that harm no other row, tables."
import json

import pytest
import yaml
from conftest import make_photos

from semmae.core import SemmaeError
from semmae.pipeline.rows import ahead, by_seed, key_of, read_rows, score_of
from semmae.pipeline.study import read_study, rows_of, run_study

PROFILE = dict(seed=0, processes=1, data=dict(source='photos', size=[16, 16]), teacher=None,
               parts=dict(source='grid', n_parts=4, grid=[2, 2]),
               encoder=dict(patch_size=4, embed_dim=16, depth=1, num_heads=2),
               decoder=dict(width=16, depth=1, heads=2),
               pretrain=dict(masking=dict(name='random', ratio=.5), epochs=1, batch=8, warmup_epochs=0),
               finetune=dict(labels=[1.], epochs=1, batch=8, warmup_epochs=1), probe=dict(labels=[]),
               segment=dict(labels=1.))
ABLATIONS = dict(random={}, inter=dict(pretrain=dict(masking=dict(name='inter'))),
                 patch=dict(encoder=dict(patch_size=5)), width=dict(encoder=dict(embed_dim=24)))


@pytest.fixture
def root(tmp_path):
    make_photos(tmp_path/'photos')
    return tmp_path


def plan(root, *lines, **about):
    study = dict(profile='p', results='rows.jsonl', rows=[dict(seeds=[0]) | line for line in lines]) | about
    (root/'params.yaml').write_text(yaml.safe_dump(
        dict(profiles=dict(p=PROFILE), ablations=ABLATIONS, studies=dict(s=study))))
    return root/'rows.jsonl'


def test_rows_are_measured_once_and_a_mistake_in_one_harms_no_other(root):
    file, said = plan(root, dict(entries=['random', 'patch', 'inter'], epochs=[2]),
                      dict(entries=['random'], epochs=[0], tuned=True)), []
    run_study(root, 's', file, log=said.append)
    found = read_rows(file)
    assert list(found) == [('random', .5, 2, 0, False), ('inter', .5, 2, 0, False),
                           ('random', .5, 0, 0, True)]
    assert any(line.startswith('patch') for line in said)
    inter, scratch = found['inter', .5, 2, 0, False], found['random', .5, 0, 0, True]
    assert (inter['config']['pretrain']['epochs'] == 2
            and inter['config']['pretrain']['masking'] == dict(name='inter', ratio=.5)
            and inter['images'] == [32, 4, 4])
    assert (0 <= scratch['scores']['class']['tuned'] <= 1 and scratch['loss'] is None
            and 'tuned' not in inter['scores']['class'])
    before = file.read_text()
    run_study(root, 's', file)
    assert file.read_text() == before


def test_a_row_is_the_same_alone_and_after_others(root):
    "Programs and optimisers that earlier rows leave are begun anew, rows of another shape have their own"
    keys, rows = ('loss', 'scores'), []
    for entries in (['inter'], ['random', 'width', 'inter']):
        file = plan(root, dict(entries=entries))
        file.unlink(missing_ok=True)
        run_study(root, 's', file)
        rows.append(read_rows(file)['inter', .5, 1, 0, False])
    assert [rows[0][k] for k in keys] == [rows[1][k] for k in keys]


def test_what_would_not_finish_is_left_for_another_time(root):
    file, said = plan(root, dict(entries=['random'], epochs=[10**9, 1])), []
    run_study(root, 's', file, minutes=10, log=said.append)
    assert [r['epochs'] for r in read_rows(file).values()] == [1] and len(said) == 2


def test_commands_side_by_side_share_the_rows(root):
    file = plan(root, dict(entries=['random', 'inter', 'width']))
    for k in 0, 1:
        run_study(root, 's', root/f'{k}.jsonl', share=(k, 2))
    halves = [set(read_rows(root/f'{k}.jsonl')) for k in (0, 1)]
    assert (not halves[0] & halves[1]
            and halves[0] | halves[1] == {key_of(r) for r in rows_of(read_study(root, 's'))}
            and not file.exists())


def test_a_study_changes_its_profile_before_its_entries_do(root):
    plan(root, dict(entries=['random', 'width']),
         change=dict(encoder=dict(embed_dim=48), parts=dict(source='given')))
    study = read_study(root, 's')
    assert study['base']['encoder']['embed_dim'] == 48 and study['base']['parts'] == dict(source='given')
    with pytest.raises(SemmaeError, match='grid'):
        plan(root, dict(entries=['random']), change=dict(grid=1))
        read_study(root, 's')


@pytest.mark.parametrize('change', [dict(pretrain=dict(epochs={})), dict(pretrain=dict(masking=3)),
                                    dict(encoder=[])], ids=str)
def test_a_wrong_change_is_refused_before_any_row(root, change):
    plan(root, dict(entries=['inter']), change=change)
    with pytest.raises(SemmaeError, match=f'studies.s.change.{next(iter(change))}'):
        read_study(root, 's')


def test_only_seeds_on_the_same_hardware_are_compared(tmp_path):
    rows = [dict(entry=e, ratio=.5, epochs=n, seed=s, device=d, scores=dict(a=dict(x=x/100)))
            for e, n, s, d, x in (('a', 1, 0, 'cpu', 5.), ('a', 1, 1, 'cpu', 7.), ('b', 1, 1, 'cpu', 4.),
                                  ('b', 1, 0, 'gpu', 9.), ('a', 2, 1, 'cpu', 50.))]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    known = read_rows(tmp_path/'rows.jsonl')
    a, b, longer = (by_seed(known, score_of('a', 'x'), entry=e, epochs=n)
                    for e, n in (('a', 1), ('b', 1), ('a', 2)))
    assert ahead(a, b)[0] == pytest.approx(3) and ahead(longer, b)[0] == pytest.approx(46)
