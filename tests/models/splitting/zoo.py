"""Models as people write them: name -> (a function that makes one, one that makes a sample of some rows and length)."""

import torch
from torch import nn
from torch.nn import functional as F

V, D = 20, 16


def tokens(rows=4, length=8):
    """Padded on the right; the longest row is shorter than the batch."""
    ids = torch.arange(1, rows * length + 1).reshape(rows, length) % (V - 1) + 1
    ids[0, length // 2 :] = 0
    ids[:, -1] = 0
    return ids


def images(rows=4, size=16):
    return torch.linspace(-1, 1, rows * 3 * size * size).reshape(rows, 3, size, size)


def layer(kind=nn.TransformerEncoderLayer, **changes):
    return kind(D, 2, 32, **{"dropout": 0.1, "batch_first": True, **changes})


class Tagger(nn.Module):
    """nn.TransformerEncoder with a padding mask: its hidden state is a nested tensor in evaluation."""

    def __init__(self, masked=False, padded=True, **changes):
        super().__init__()
        self.embedding = nn.Embedding(V, D, padding_idx=0)
        self.encoder = nn.TransformerEncoder(layer(**changes), 4, norm=nn.LayerNorm(D))
        self.head = nn.Linear(D, V)
        self.masked, self.padded = masked, padded

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]) if self.masked else None
        padding = (ids == 0) if self.padded else None
        hidden = self.encoder(self.embedding(ids), mask, src_key_padding_mask=padding, is_causal=self.masked)
        return self.head(hidden)


class SequenceFirst(nn.Module):
    """torch's own layout (T, B, D)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, 3)
        self.encoder = nn.TransformerEncoder(layer(batch_first=False), 4)

    def forward(self, ids):
        return self.head(self.encoder(self.embedding(ids).transpose(0, 1)).mean(0))


class Decoder(nn.Module):
    """nn.TransformerDecoder over a memory that is an input."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.decoder = nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 4)

    def forward(self, ids, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.decoder(self.embedding(ids), memory, tgt_mask=mask, tgt_key_padding_mask=ids == 0))


class Translator(nn.Module):
    """nn.Transformer as in the tutorial."""

    def __init__(self):
        super().__init__()
        self.source, self.target, self.head = nn.Embedding(V, D), nn.Embedding(V, D), nn.Linear(D, V)
        self.transformer = nn.Transformer(D, 2, 2, 4, 32, batch_first=True)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(self.source(source), self.target(target), tgt_mask=mask)
        return self.head(hidden)


class Residual(nn.Module):
    """A block of openai/CLIP: (T, B, D)."""

    def __init__(self):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(D, 2), nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x):
        n = self.ln_1(x)
        x = x + self.attn(n, n, n, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Resblocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.Sequential(*[Residual() for _ in range(4)])

    def forward(self, x):
        return self.resblocks(x)


class ClipTower(nn.Module):
    """The image tower of openai/CLIP, with class token, positions, projection."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, D, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(D))
        self.positional_embedding = nn.Parameter(torch.randn(17, D))
        self.ln_pre, self.ln_post = nn.LayerNorm(D), nn.LayerNorm(D)
        self.transformer = Resblocks()
        self.proj = nn.Parameter(torch.randn(D, 5))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding + torch.zeros(x.shape[0], 1, D, device=x.device), x], 1)
        x = self.ln_pre(x + self.positional_embedding).permute(1, 0, 2)
        x = self.ln_post(self.transformer(x).permute(1, 0, 2)[:, 0])
        return x @ self.proj


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * D, D))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask))


class Pairs(nn.Module):
    """The transformer of lucidrains' networks: blocks are pairs in a ModuleList."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), Mlp()]) for _ in range(4))

    def forward(self, x):
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return self.norm(x)


class Dictionaries(Pairs):
    """The same with dictionaries."""

    def __init__(self):
        super().__init__()
        made = (nn.ModuleDict({"attention": Attention(), "mlp": Mlp()}) for _ in range(4))
        self.layers = nn.ModuleList(made)

    def forward(self, x):
        for block in self.layers:
            x = x + block["attention"](x)
            x = x + block["mlp"](x)
        return self.norm(x)


class PatchClassifier(nn.Module):
    """A ViT around such a transformer."""

    def __init__(self, transformer):
        super().__init__()
        self.patch, self.drop = nn.Conv2d(3, D, 4, 4), nn.Dropout(0.1)
        self.position, self.token = nn.Parameter(torch.randn(1, 17, D)), nn.Parameter(torch.randn(1, 1, D))
        self.transformer, self.head = transformer, nn.Linear(D, 5)

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = self.drop(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position)
        return self.head(self.transformer(x).mean(1))


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation, self.linear = nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x, c):
        shift, scale = self.modulation(F.silu(c)).chunk(2, 1)
        return x + self.linear(x * scale[:, None] + shift[:, None])


class DiT(nn.Module):
    """The condition goes to every block and to the end; with unpatchify and label dropout in training."""

    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Conv2d(3, D, 4, 4)
        self.t_embedder = nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D))
        self.y_embedder, self.drop = nn.Embedding(6, D), nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Conditioned() for _ in range(4))
        self.final_modulation, self.final = nn.Linear(D, D), nn.Linear(D, 3 * 16)

    def forward(self, x, t, y):
        size = x.shape[-1]
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(t[:, None].float() / 1000) + self.drop(self.y_embedder(y))
        for block in self.blocks:
            x = block(x, c)
        x = self.final(x * self.final_modulation(c)[:, None])
        return F.fold(x.transpose(1, 2), size, 4, stride=4)


class NanoGPT(nn.Module):
    """nanoGPT as published: logits of the last token only unless it is given targets; tied weights."""

    def __init__(self):
        super().__init__()
        parts = {
            "wte": nn.Embedding(V, D),
            "wpe": nn.Embedding(32, D),
            "drop": nn.Dropout(0.1),
            "ln_f": nn.LayerNorm(D),
        }
        parts["h"] = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Dropout(0.1)) for _ in range(4))
        self.transformer, self.lm_head = nn.ModuleDict(parts), nn.Linear(D, V, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1)


class Recurrent(nn.Module):
    """A stack of LSTMs that takes and returns (h, c)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.drop, self.head = nn.Embedding(V, D), nn.Dropout(0.1), nn.Linear(D, V)
        self.layers = nn.ModuleList(nn.LSTM(D, D, batch_first=True) for _ in range(3))

    def forward(self, ids, state):
        x, states = self.drop(self.embedding(ids)), []
        for lstm, h, c in zip(self.layers, *state, strict=True):
            x, one = lstm(x, (h[None].contiguous(), c[None].contiguous()))
            states.append(one)
        return self.head(x), states


class Layerdrop(nn.Module):
    """Blocks are left out at random in training."""

    def __init__(self):
        super().__init__()
        self.layerdrop = 0.4
        self.inp, self.out = nn.Linear(8, D), nn.Linear(D, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Dropout(0.1)) for _ in range(4))

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            if not (self.training and torch.rand([]) < self.layerdrop):
                x = block(x)
        return self.out(x)


class Outside(nn.Module):
    """Begins and ends outside its blocks: a residual around all of them, and one input that only the end takes."""

    def __init__(self):
        super().__init__()
        self.embedding, self.drop, self.norm, self.head = (
            nn.Embedding(V, D),
            nn.Dropout(0.1),
            nn.LayerNorm(D),
            nn.Linear(D, V),
        )
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(0.1)) for _ in range(4))

    def forward(self, ids, *, weight):
        first = x = self.drop(self.embedding(ids))
        for block in self.blocks:
            x = block(x)
        return {"logits": F.dropout(self.head(self.norm(x) + first) * weight[:, None], 0.1, self.training)}


class Wide(nn.Module):
    """Blocks in several nn.Sequential, with something between them (ResNet, ConvNeXt)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(*[Conv(8) for _ in range(2)])
        self.down = nn.Conv2d(8, 16, 2, 2)
        self.layer2 = nn.Sequential(*[Conv(16) for _ in range(3)])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layer2(self.down(self.layer1(self.stem(x)))).mean((2, 3)))


class Conv(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class Segmenter(Wide):
    """A dense output of the size of the image."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        deep = self.layer2(self.down(self.layer1(self.stem(x))))
        return {"out": F.interpolate(self.head(deep), size=x.shape[-2:], mode="bilinear")}


class UNet(nn.Module):
    """Skip connections, no blocks."""

    def __init__(self):
        super().__init__()
        self.enter, self.down = Conv(3), nn.Conv2d(3, D, 2, 2)
        self.mid, self.up, self.out = Conv(D), nn.ConvTranspose2d(D, 3, 2, 2), nn.Conv2d(6, 2, 1)

    def forward(self, image):
        skip = self.enter(image)
        return self.out(torch.cat([skip, self.up(self.mid(F.relu(self.down(skip))))], 1))


def state(rows):
    return (torch.linspace(-1, 1, 3 * rows * D).reshape(3, rows, D), torch.zeros(3, rows, D))


def weighted(rows):
    return {"ids": tokens(rows), "weight": torch.linspace(1, 2, rows)[:, None]}


ZOO = {
    "TransformerEncoder, padded": (Tagger, tokens),
    "TransformerEncoder, masked": (lambda: Tagger(masked=True, padded=False), tokens),
    "TransformerEncoder, masked and padded": (lambda: Tagger(masked=True), tokens),
    "TransformerEncoder, plain": (lambda: Tagger(padded=False), lambda rows: (tokens(rows),)),
    "TransformerEncoder, norm first": (lambda: Tagger(norm_first=True), tokens),
    "TransformerEncoder, sequence first": (SequenceFirst, tokens),
    "TransformerDecoder": (Decoder, lambda rows: (tokens(rows), torch.ones(rows, 5, D))),
    "Transformer": (Translator, lambda rows: {"source": tokens(rows, 5), "target": tokens(rows)}),
    "CLIP tower": (ClipTower, images),
    "ViT of pairs": (lambda: PatchClassifier(Pairs()), images),
    "ViT of dictionaries": (lambda: PatchClassifier(Dictionaries()), images),
    "DiT": (DiT, lambda rows: (images(rows), torch.arange(rows), torch.arange(rows) % 6)),
    "nanoGPT": (NanoGPT, tokens),
    "LSTM with state": (Recurrent, lambda rows: (tokens(rows), state(rows))),
    "layerdrop": (Layerdrop, lambda rows: torch.linspace(-1, 1, rows * 8).reshape(rows, 8)),
    "around its blocks": (Outside, weighted),
    "several widths": (Wide, images),
    "segmentation": (Segmenter, images),
    "U-Net": (UNet, images),
}
