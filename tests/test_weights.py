"Weights in and out: every format against the library that it comes from, or built by renaming."
import argparse
import json
import os

import pytest
import timm
import torch
from conftest import random_images
from safetensors.torch import save_file
from timm.models import save_for_hf
from transformers import (ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining,
                          ViTMAEModel, ViTModel)

from semmae.core import SemmaeError, generator, read_json
from semmae.images import normalize
from semmae.mae import MAE
from semmae.masking import find_strategy
from semmae.vit import block_output, encode, make_encoder, pixels_of
from semmae.weights import (load_encoder, load_mae, mae_state, open_encoder, push_to_hub, save_encoder,
                            save_mae, transformers_state)

IMAGES = random_images(2, 32, 32)
PIXELS = normalize(IMAGES.float())
SIZES = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2)
CARD = dict(license='apache-2.0', data='noise', recipe='none', scores={'k-NN': '10 %'})
ARGS = argparse.Namespace(lr=.1)


def peer(name='vit_base_patch16_224', num_classes=0, **kw):
    "A model of timm's with weights of which none is as it started"
    model = timm.create_model(name, num_classes=num_classes, **SIZES | kw).eval()
    gen = generator('peer')
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=gen)*.1
    return model


def mae_decoder(grid=4, patch=8):
    "A decoder under MAE's names"
    side = grid*patch
    encoder = make_encoder(image=(side, side), patch_size=patch, embed_dim=128, depth=1, num_heads=2)
    mae = MAE(encoder, width=32, depth=2, heads=2)
    return {k: v for k, v in mae_state(mae.encoder, mae).items() if k.startswith(('decoder', 'mask_token'))}


def prefixed(state, start):
    return {f'{start}{k}': v for k, v in state.items()}


def dinov2(model, chunks=False):
    "As DINOv2's code names them: registers apart, the class token's position in the positions"
    state = model.state_dict()
    if 'reg_token' in state:
        first = torch.randn(1, 1, 128, generator=generator('position'))
        state |= dict(register_tokens=state.pop('reg_token'), cls_token=state['cls_token'] - first,
                      pos_embed=torch.cat([first, state['pos_embed']], 1))
    if chunks:
        state = {k.replace('blocks.', f'blocks.{k.split(".")[1]}.') if k.startswith('blocks') else k: v
                 for k, v in state.items()}
    return state | dict(mask_token=torch.zeros(1, 128))


def full(model, masked=None):
    "The checkpoint of a run of iBOT or DINO, whose student is another model"
    heads = {'head.mlp.0.weight': torch.zeros(3, 3)}
    other = {k: v + 1 for k, v in model.state_dict().items()}
    student = prefixed(other, 'module.backbone.') | prefixed(heads, 'module.') | (masked or {})
    teacher = prefixed(model.state_dict(), 'backbone.') | heads
    return dict(student=student, teacher=teacher, epoch=3, args=ARGS)


PLAIN, TUNED, SCALED = {}, dict(global_pool='avg', num_classes=10), dict(init_values=1e-5)
REGISTERS = SCALED | dict(reg_tokens=4, no_embed_class=True)
GATED = dict(name='vit_giant_patch14_dinov2', mlp_ratio=16/3, init_values=1.)
FORMATS = {  # the model, and what its file holds
    'mae': (PLAIN, lambda m: dict(model=m.state_dict())),
    'mae with decoder': (PLAIN, lambda m: dict(model=m.state_dict() | mae_decoder(), args=ARGS, epoch=1)),
    'mae fine-tuned': (TUNED, lambda m: dict(model=m.state_dict(), args=ARGS)),
    'semmae of patch 8': (dict(img_size=224, depth=1),
                          lambda m: dict(model=m.state_dict() | mae_decoder(28))),
    'ibot teacher': (PLAIN, lambda m: dict(state_dict=m.state_dict())),
    'ibot': (PLAIN, lambda m: full(m, {'module.backbone.masked_embed': torch.zeros(1, 128)})),
    'dino': (PLAIN, lambda m: m.state_dict()),
    'dino full': (PLAIN, full),
    'dinov2': (SCALED, dinov2),
    'dinov2 with registers': (REGISTERS, dinov2),
    'dinov2 gated': (GATED, lambda m: {k.replace('fc1', 'w12').replace('fc2', 'w3'): v
                                       for k, v in dinov2(m).items()}),
    'dinov2 training': (SCALED, lambda m: dict(teacher=prefixed(dinov2(m, chunks=True), 'backbone.')
                                               | {'dino_head.last_layer.weight': torch.zeros(3)})),
    'lightly': (PLAIN, lambda m: prefixed(m.state_dict(), 'backbone.vit.')
                | prefixed(mae_decoder(), 'decoder.')),
    'solo-learn': (dict(num_heads=12, embed_dim=192),
                   lambda m: dict(state_dict=prefixed(m.state_dict(), 'backbone.')
                                  | prefixed(mae_decoder(), 'decoder.'), hyper_parameters={})),
    'compiled': (PLAIN, lambda m: prefixed(m.state_dict(), '_orig_mod.')),
    'no class token': (dict(class_token=False, global_pool='avg'), lambda m: m.state_dict()),
    'bare norm': (dict(class_token=False, global_pool='avg', fc_norm=False), lambda m: m.state_dict())}


def same_features(encoder, model):
    "Tokens of both, the first after its own preparation of the images"
    imgs = normalize(torch.nn.functional.interpolate(IMAGES.float(), model.patch_embed.img_size))
    want = model.fc_norm(model.forward_features(imgs))
    return torch.allclose(encode(encoder, imgs), want, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', FORMATS)
def test_features_are_those_of_the_model_that_was_written(tmp_path, capsys, name):
    kw, wrap = FORMATS[name]
    model = peer(**kw)
    torch.save(wrap(model), tmp_path/'file.pth')
    encoder = open_encoder(weights=tmp_path/'file.pth')
    assert same_features(encoder, model)
    line, = capsys.readouterr().out.splitlines()
    assert 'file.pth' in line and f'{len(model.blocks)} blocks' in line
    save_encoder(encoder, tmp_path/'ours.safetensors')
    assert same_features(load_encoder(tmp_path/'ours.safetensors').eval(), model), 'in a file of ours too'


@torch.no_grad()
def test_the_student_by_name(tmp_path):
    model = peer()
    torch.save(full(model), tmp_path/'checkpoint.pth')
    student = open_encoder(weights=tmp_path/'checkpoint.pth', branch='student')
    assert torch.equal(student.norm.bias, model.norm.bias + 1)
    torch.save(model.state_dict(), tmp_path/'bare.pth')
    with pytest.raises(SemmaeError, match='student'):
        open_encoder(weights=tmp_path/'bare.pth', branch='student')


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    "To the last bit of what was stored, decoders included"
    encoder = make_encoder(image=(32, 32), patch_size=8, embed_dim=128, depth=2, num_heads=2)
    mae = MAE(encoder, width=64, depth=1, heads=16)
    state = {k: v.to(dtype) for k, v in mae_state(encoder, mae).items()}
    torch.save(dict(model=state), tmp_path/'half.pth')
    again = load_mae(tmp_path/'half.pth', norm_pixels=True)
    assert all(torch.equal(v, state[k].float()) for k, v in again.encoder.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize('kw', [
    dict(qk_norm=True), dict(pre_norm=True), dict(reg_tokens=2, no_embed_class=True),
    dict(class_token=False, global_pool='avg'), dict(init_values=.1), dict(image=(32, 48)),
    dict(channels=1), dict(channels=5), dict(channels=1, stats=[[.5]*3, [.2]*3])], ids=str)
def test_our_folders_for_timm_open_here_and_there(tmp_path, kw):
    sizes = dict(image=(32, 32), patch_size=8, embed_dim=96, depth=2, num_heads=3)
    encoder, channels = make_encoder(**sizes | kw).eval(), kw.get('channels', 3)
    save_encoder(encoder, tmp_path/'f', format='timm', **CARD)
    again, pixels = open_encoder(weights=tmp_path/'f'), torch.randn(2, channels, *encoder.recipe['image'])
    assert torch.equal(encode(again, pixels), encode(encoder, pixels))
    theirs = timm.create_model(f'local-dir:{tmp_path}/f', pretrained=True).eval()
    assert torch.equal(theirs.forward_features(pixels), encoder.forward_features(pixels))
    images = torch.randint(256, (2, channels, 40, 40), dtype=torch.uint8)
    assert torch.allclose(pixels_of(again, images), pixels_of(encoder, images), atol=1e-5)
    save_encoder(again, tmp_path/'g', format='timm', **CARD)
    for k in ('mean', 'std'):
        assert read_json(tmp_path/'g/config.json')['pretrained_cfg'][k] == pytest.approx(
            read_json(tmp_path/'f/config.json')['pretrained_cfg'][k])


@torch.no_grad()
def test_timms_folder(tmp_path):
    "Its colours, its heads and its size are those that timm notes"
    model = peer('vit_small_patch16_224', num_heads=4)
    save_for_hf(model, tmp_path, model_args=SIZES | dict(num_heads=4), safe_serialization=True)
    encoder = open_encoder(weights=tmp_path)
    assert same_features(encoder, model) and encoder.blocks[0].attn.num_heads == 4
    assert encoder.stats[0] == [.5, .5, .5]


def vit_config(kind=ViTConfig, **kw):
    sizes = dict(image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=2, num_attention_heads=3,
                 intermediate_size=384)
    return kind(**sizes | kw)


def shuffled(model):
    "Weights and positions of which none is as it started, but a decoder's positions"
    gen = generator('theirs')
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=gen)*.1
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize('eps', [1e-12, 1e-6])
@pytest.mark.parametrize('kind', [ViTModel, ViTForImageClassification, ViTMAEModel])
def test_transformers_encoders(tmp_path, kind, eps):
    "Their eps, heads and size are carried"
    config = vit_config(ViTMAEConfig if kind is ViTMAEModel else ViTConfig, layer_norm_eps=eps, mask_ratio=0.)
    model = shuffled(kind(config))
    model.save_pretrained(tmp_path)
    encoder = open_encoder(weights=tmp_path)
    vit = getattr(model, 'vit', model)
    pixels = PIXELS*1e-4  # so that the eps shows
    kw = dict(noise=torch.arange(16.).expand(2, -1)) if kind is ViTMAEModel else {}
    want = vit(pixels, **kw).last_hidden_state
    assert torch.allclose(encode(encoder, pixels), want, atol=1e-5)
    again = open_encoder(weights=tmp_path/'model.safetensors')
    assert torch.equal(encode(again, pixels), encode(encoder, pixels)), 'the file itself, named'


def decoded(folder, **kw):
    "A ViTMAE of transformers with positions as a trained one has them"
    model = ViTMAEForPreTraining(vit_config(
        ViTMAEConfig, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=128, **kw))
    pos = MAE(make_encoder(image=(32, 32), patch_size=8, embed_dim=96, depth=1, num_heads=3), width=32,
              depth=1, heads=2).decoder.pos
    model.decoder.decoder_pos_embed.data[0, 1:] = pos  # a fresh model's are zero
    model = shuffled(model)
    model.save_pretrained(folder)
    return model


def their_loss(model, ids_keep, ids_mask):
    order, ranks = torch.cat([ids_keep, ids_mask], 1), torch.arange(16.).expand(2, -1)
    return model(PIXELS, noise=torch.zeros(2, 16).scatter_(1, order, ranks)).loss


MASKS = find_strategy('random', .75)(torch.zeros(2, 4, 4), generator('masks'))


@torch.no_grad()
@pytest.mark.parametrize('norm_pixels', [True, False])
def test_vitmae_both_ways(tmp_path, norm_pixels):
    theirs = decoded(tmp_path/'theirs', norm_pix_loss=norm_pixels)
    ours = load_mae(tmp_path/'theirs').eval()
    assert ours.norm_pixels == norm_pixels and ours.encoder.norm.eps == ours.decoder.norm.eps == 1e-12
    assert torch.allclose(ours(PIXELS, *MASKS)[0], their_loss(theirs, *MASKS), atol=1e-5)
    save_mae(ours, tmp_path/'again', format='transformers', **CARD)
    again = ViTMAEForPreTraining.from_pretrained(tmp_path/'again').eval()
    assert again.config.layer_norm_eps == 1e-12 and again.config.norm_pix_loss == norm_pixels
    for k, v in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[k], v), k
    assert torch.allclose(their_loss(again, *MASKS), their_loss(theirs, *MASKS), atol=1e-6)


@torch.no_grad()
def test_semmaes_autoencoder_of_patch_8(tmp_path):
    "784 patches of an image, a quarter of which it was trained on at a time"
    encoder = make_encoder(image=(224, 224), patch_size=8, embed_dim=64, depth=1, num_heads=1)
    mae = MAE(encoder, width=32, depth=1, heads=16, norm_pixels=False).eval()
    torch.save(dict(model=mae_state(mae.encoder, mae)), tmp_path/'semmae.pth')
    again = load_mae(tmp_path/'semmae.pth', norm_pixels=False).eval()
    assert again.encoder.pos_embed.shape == (1, 785, 64)
    masks = find_strategy('random', .75)(torch.zeros(1, 28, 28), generator(0))
    pixels = torch.randn(1, 3, 224, 224)
    assert torch.equal(again(pixels, *masks)[0], mae(pixels, *masks)[0])


@torch.no_grad()
@pytest.mark.parametrize('start, wrap', [
    (('', ''), lambda x: dict(model=x, args=ARGS)),
    (('backbone.vit.', 'decoder.'), lambda x: x),
    (('backbone.', 'decoder.'), lambda x: dict(state_dict=x))], ids=['mae', 'lightly', 'solo-learn'])
def test_an_autoencoder_under_other_names(tmp_path, start, wrap):
    encoder = make_encoder(image=(32, 32), patch_size=8, embed_dim=768, depth=1, num_heads=12)
    mae = MAE(encoder, width=32, depth=2, heads=16, norm_pixels=False).eval()
    state = mae_state(mae.encoder, mae)
    decoder = {k: v for k, v in state.items() if k.startswith(('decoder', 'mask_token'))}
    encoder = {k: v for k, v in state.items() if k not in decoder}
    torch.save(wrap(prefixed(encoder, start[0]) | prefixed(decoder, start[1])), tmp_path/'file.ckpt')
    again = load_mae(tmp_path/'file.ckpt', norm_pixels=False).eval()
    solo = start[0] == 'backbone.'
    assert again.decoder.norm.eps == (1e-5 if solo else 1e-6)
    assert torch.allclose(again(PIXELS, *MASKS)[0], mae(PIXELS, *MASKS)[0], atol=1e-3 if solo else 0)


@torch.no_grad()
def test_every_format_that_we_write_is_read_again(tmp_path):
    "To the bit, and opens in the libraries"
    encoder = make_encoder(image=(32, 32), patch_size=8, embed_dim=96, depth=2, num_heads=3,
                           stats=[[.1, .2, .3], [.4, .5, .6]]).eval()
    mae = MAE(encoder, width=32, depth=2, heads=2, norm_pixels=False).eval()
    for format in ('timm', 'transformers', 'mae'):
        save_encoder(encoder, tmp_path/format, format=format, **CARD)
        again = open_encoder(weights=tmp_path/format, num_heads=3)
        assert torch.equal(encode(again, PIXELS), encode(encoder, PIXELS)), format
        assert format == 'mae' or again.stats == encoder.stats
    for format in (None, 'transformers', 'mae'):
        save_mae(mae, tmp_path/f'{format}_mae', format=format, **CARD)
        kw = dict(num_heads=3, heads=2, norm_pixels=False) if format == 'mae' else {}
        again = load_mae(tmp_path/f'{format}_mae', **kw).eval()
        assert torch.equal(again(PIXELS, *MASKS)[0], mae(PIXELS, *MASKS)[0]), format
        assert again.norm_pixels is False
    theirs = ViTModel.from_pretrained(tmp_path/'transformers').eval()
    assert torch.allclose(theirs(PIXELS).last_hidden_state, encode(encoder, PIXELS), atol=1e-5)
    theirs = timm.create_model(f'local-dir:{tmp_path}/timm', pretrained=True).eval()
    assert torch.equal(theirs.forward_features(PIXELS), encoder.forward_features(PIXELS))
    data = timm.data.resolve_model_data_config(theirs)
    assert [list(data[k]) for k in ('mean', 'std', 'input_size')] == [[.1, .2, .3], [.4, .5, .6], [3, 32, 32]]
    from transformers import AutoImageProcessor
    processor = AutoImageProcessor.from_pretrained(tmp_path/'transformers')
    assert list(processor.image_mean) == [.1, .2, .3] and processor.size['height'] == 32
    for card in (tmp_path/'timm/README.md', tmp_path/'transformers/README.md'):
        assert all(word in card.read_text() for word in ('license: apache-2.0', 'noise', 'k-NN', 'SemMAE'))


def test_an_encoder_is_uploaded_by_timm(monkeypatch):
    sent = {}
    monkeypatch.setattr('semmae.weights.push_to_hf_hub',
                        lambda model, repo, **kw: sent.update(kw, repo=repo, cfg=model.pretrained_cfg))
    encoder = make_encoder(image=(32, 48), patch_size=8, embed_dim=48, depth=1, num_heads=3)
    push_to_hub(encoder, 'me/mine', **CARD)
    assert sent['repo'] == 'me/mine' and sent['model_card']['license'] == 'apache-2.0'
    assert sent['model_args']['img_size'] == [32, 48] and sent['cfg']['num_classes'] == 0


def test_a_base_model_has_as_many_tensors_as_theirs():
    with torch.device('meta'):
        vit = make_encoder('vit_base_patch16_224', image=(224, 224))
        mae = MAE(vit, width=512, depth=8, heads=16)
        theirs = ViTMAEForPreTraining(ViTMAEConfig())
    assert len(mae_state(vit)) == 150 and len(mae_state(vit, mae)) == 254
    ours = transformers_state(vit, mae)
    assert len(ours) == 334 == len(theirs.state_dict())


@torch.no_grad()
def test_positions_of_another_grid_are_resampled_and_that_is_said(tmp_path, capsys):
    torch.save(dict(model=peer().state_dict()), tmp_path/'mae.pth')
    encoder = open_encoder(weights=tmp_path/'mae.pth', image=(64, 32))
    assert block_output(encoder, IMAGES).patches.shape == (2, 8, 4, 128)
    assert 'positions resampled' in capsys.readouterr().out
    open_encoder(weights=tmp_path/'mae.pth', image=(32, 32))
    assert 'resampled' not in capsys.readouterr().out
    save_encoder(encoder, tmp_path/'ours.safetensors')
    open_encoder(weights=tmp_path/'ours.safetensors', image=(32, 32))
    assert 'resampled' in capsys.readouterr().out
    torch.save(dinov2(peer(**REGISTERS)), tmp_path/'dinov2.pth')
    open_encoder(weights=tmp_path/'dinov2.pth')
    assert 'resampled' not in capsys.readouterr().out


class Evil:
    def __reduce__(self):
        return os.system, ('touch ran',)


def halved(state):
    return dict(list(state.items())[:len(state)//2])


MODEL = peer()
BAD = {  # what a file holds, and what its refusal names
    'code': (lambda: dict(model=MODEL.state_dict(), args=Evil()), 'would run code'),
    'a list': (lambda: [1, 2], 'list'),
    'nothing': (dict, 'no format'),
    'half': (lambda: dict(model=halved(MODEL.state_dict())), 'norm'),
    'no blocks': (lambda: {k: v for k, v in MODEL.state_dict().items() if 'block' not in k}, 'whole'),
    'half a transformers': (lambda: {k: v for k, v in transformers_state(make_encoder(depth=2)).items()
                                     if 'key' not in k}, 'whole'),
    'dinov3': (lambda: MODEL.state_dict() | {'rope_embed.periods': torch.zeros(3)}, 'DINOv3'),
    'resnet': (lambda: {'layer1.0.conv1.weight': torch.zeros(3)}, 'ResNet'),
    'moco': (lambda: dict(state_dict=prefixed(MODEL.state_dict(), 'module.base_encoder.')
                          | prefixed(MODEL.state_dict(), 'module.momentum_encoder.')), 'MoCo'),
    'clip': (lambda: {'visual.proj': torch.zeros(3)}, 'CLIP'),
    'no square': (lambda: MODEL.state_dict() | dict(pos_embed=torch.zeros(1, 13, 128)), '12 patches')}


@pytest.mark.parametrize('name', BAD)
def test_a_file_that_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make, named = BAD[name]
    torch.save(make(), tmp_path/'bad.pth')
    for read in (lambda path: open_encoder(weights=path), lambda path: load_mae(path, norm_pixels=True)):
        with pytest.raises(SemmaeError, match=f'{named}|no decoder') as e:
            read(tmp_path/'bad.pth')
        assert 'bad.pth' in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path/'ran').exists()


def with_key(key, value):
    return lambda: MODEL.state_dict() | mae_decoder() | {key: value}


MALFORMED = {
    'video': with_key('patch_embed.proj.weight', torch.zeros(128, 3, 2, 8, 8)),
    'flat kernel': with_key('patch_embed.proj.weight', torch.zeros(128, 192)),
    'flat positions': with_key('pos_embed', torch.zeros(17)),
    'positions of another width': with_key('pos_embed', torch.zeros(1, 17, 64)),
    'number for a name': with_key(3, torch.zeros(3)),
    'scalar': with_key('decoder_embed.weight', torch.zeros(())),
    'no student': lambda: dict(teacher={k: v for k, v in full(MODEL)['teacher'].items() if 'norm1' not in k},
                               student=None),
    'no mask token': lambda: {k: v for k, v in with_key('x', torch.zeros(1))().items() if k != 'mask_token'}}


@pytest.mark.parametrize('name', MALFORMED)
def test_a_malformed_file_is_refused_in_one_sentence(tmp_path, name):
    torch.save(MALFORMED[name](), tmp_path/'odd.pth')
    refused = 0
    for read in (lambda path: open_encoder(weights=path), lambda path: load_mae(path, norm_pixels=True)):
        try:
            read(tmp_path/'odd.pth')
        except SemmaeError as e:
            refused += 1
            assert 'odd.pth' in str(e) and '\n' not in str(e)
    assert refused or name == 'number for a name'


@pytest.mark.parametrize('config', [
    '{', '{"architecture": "vit_base_patch16_224", "model_args": null, "pretrained_cfg": {}}',
    '{"architecture": "nothing"}', '{"image_mean": null, "image_std": 3}', '{"num_attention_heads": "x"}',
    '{"image_size": "x"}', '{"layer_norm_eps": "x"}', '{"model_type": "beit"}'])
def test_what_lies_beside_weights_may_be_wrong(tmp_path, config):
    save_file(MODEL.state_dict(), tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(config)
    with pytest.raises(SemmaeError, match=tmp_path.name):
        open_encoder(weights=tmp_path)


@torch.no_grad()
@pytest.mark.parametrize('change', [dict(hidden_act='relu'), dict(num_hidden_layers=1),
                                    dict(num_hidden_layers=3)], ids=str)
def test_a_folder_whose_config_tells_of_another_model(tmp_path, change):
    shuffled(ViTModel(vit_config())).save_pretrained(tmp_path)
    config = read_json(tmp_path/'config.json')
    (tmp_path/'config.json').write_text(json.dumps(config | change))
    with pytest.raises(SemmaeError, match=next(iter(change))):
        open_encoder(weights=tmp_path)


def test_damaged_pickles(tmp_path):
    "Whatever torch raises"
    torch.save(dict(model=dict(list(MODEL.state_dict().items())[:3]), args=ARGS), tmp_path/'whole.pth',
               _use_new_zipfile_serialization=False)
    whole = (tmp_path/'whole.pth').read_bytes()
    for k in range(150):
        gen, bad = generator('damage', k), bytearray(whole)
        for at in torch.randint(0, 900, (3,), generator=gen).tolist():
            bad[at] = int(torch.randint(0, 256, (1,), generator=gen))
        (tmp_path/'bad.pth').write_bytes(bad)
        with pytest.raises(SemmaeError, match='bad.pth'):
            open_encoder(weights=tmp_path/'bad.pth')


@pytest.mark.parametrize('share', [0, .01, .5, .99])
@pytest.mark.parametrize('name', ['file.pth', 'model.safetensors'])
def test_a_file_that_is_cut_off(tmp_path, name, share):
    save = torch.save if name.endswith('pth') else save_file
    save(MODEL.state_dict(), tmp_path/name)
    whole = (tmp_path/name).read_bytes()
    (tmp_path/name).write_bytes(whole[:int(share*len(whole))])
    with pytest.raises(SemmaeError, match=name):
        open_encoder(weights=tmp_path/name)


def test_what_is_missing_is_named(tmp_path):
    torch.save(dict(model=MODEL.state_dict()), tmp_path/'mae.pth')
    torch.save(dict(model=MODEL.state_dict() | mae_decoder()), tmp_path/'full.pth')
    moved = dict(decoder_pos_embed=torch.zeros(1, 17, 32))
    torch.save(dict(model=MODEL.state_dict() | mae_decoder() | moved), tmp_path/'moved.pth')
    (tmp_path/'empty').mkdir()
    for f, named in ((lambda: load_mae(tmp_path/'mae.pth', norm_pixels=True), 'no decoder'),
                     (lambda: load_mae(tmp_path/'full.pth'), 'norm_pixels'),
                     (lambda: load_mae(tmp_path/'full.pth', norm_pixels=True, depth=3), 'does not fit'),
                     (lambda: load_mae(tmp_path/'moved.pth', norm_pixels=True), 'positions'),
                     (lambda: load_mae(tmp_path/'none'), 'none'),
                     (lambda: open_encoder(weights=tmp_path/'empty'), 'empty'),
                     (lambda: open_encoder('vit_small_patch16_224', tmp_path/'mae.pth'), 'vit_small'),
                     (lambda: open_encoder(weights=tmp_path/'mae.pth', image=(36, 36)), '36×36')):
        with pytest.raises(SemmaeError, match=named):
            f()


def test_an_encoder_that_a_format_has_no_place_for(tmp_path):
    wide = make_encoder(image=(32, 64), patch_size=8, embed_dim=48, depth=1, num_heads=3)
    for encoder, named in ((make_encoder(reg_tokens=2, depth=1), 'reg_token'), (wide, '4×8'),
                           (make_encoder(class_token=False, global_pool='avg', depth=1), 'class token'),
                           (make_encoder(no_embed_class=True, depth=1), 'class token')):
        for format in ('mae', 'transformers'):
            with pytest.raises(SemmaeError, match=named):
                save_encoder(encoder, tmp_path/'x', format=format, **CARD)
        assert not (tmp_path/'x').exists()
        save_encoder(encoder, tmp_path/'t', format='timm', **CARD)
    for format in ('mae', 'timm'):
        with pytest.raises(SemmaeError, match='eps'):
            save_encoder(make_encoder(depth=1, eps=1e-5), tmp_path/'y', format=format, **CARD)
    unlike, bare = MAE(make_encoder(depth=1, eps=1e-5)), MAE(make_encoder(depth=1, qkv_bias=False))
    for mae, named in ((unlike, 'eps'), (bare, 'bias')):
        for format in ('mae', 'transformers'):
            with pytest.raises(SemmaeError, match=named):
                save_mae(mae, tmp_path/'y', format=format, **CARD)
    save_encoder(bare.encoder, tmp_path/'bare', format='transformers', **CARD)
    assert torch.equal(open_encoder(weights=tmp_path/'bare').pos_embed, bare.encoder.pos_embed)
    (tmp_path/'file').touch()
    (tmp_path/'folder').mkdir()
    for format, path in (('timm', 'file'), ('transformers', 'file'), ('mae', 'folder')):
        with pytest.raises(SemmaeError, match=path):
            save_encoder(make_encoder(depth=1), tmp_path/path, format=format, **CARD)
    for card in (dict(), dict(license='mine: all', data='x')):
        with pytest.raises(SemmaeError, match='license'):
            save_encoder(make_encoder(depth=1), tmp_path/'c', format='timm', **card)
    crossed = MAE(make_encoder(depth=1), kind='cross', width=32, depth=1, heads=2)
    for format in ('mae', 'transformers'):
        with pytest.raises(SemmaeError, match='cross'):
            save_mae(crossed, tmp_path/'z', format=format, **CARD)
    save_mae(crossed, tmp_path/'z')
    assert load_mae(tmp_path/'z').decoder.kind == 'cross'
