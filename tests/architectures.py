"""Networks as people write them, with random weights."""

import torch
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import from_module
from scalegmn.networks import NetParams


class BasicBlock(nn.Module):
    """Of a ResNet."""

    def __init__(self, in_dim, dim, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.downsample = None
        if stride > 1 or in_dim != dim:
            self.downsample = nn.Sequential(nn.Conv2d(in_dim, dim, 1, stride, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += identity
        return self.relu(y)


class ResNet18(nn.Module):
    """He et al., 2016; 64 channels at first, and four stages of two blocks, in the original."""

    def __init__(self, dim=64, num_classes=1000, num_stages=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        dims = [dim, dim, 2 * dim, 4 * dim, 8 * dim]
        blocks = []
        for index in range(num_stages):
            blocks.append(BasicBlock(dims[index], dims[index + 1], 1 if index == 0 else 2))
            blocks.append(BasicBlock(dims[index + 1], dims[index + 1], 1))
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(dims[num_stages], num_classes)

    def forward(self, x):
        x = self.layers(self.maxpool(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, group norm, a scale per channel."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.norm = nn.GroupNorm(2, 12)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.scale = nn.Parameter(torch.randn(12, 1, 1))
        self.pointwise = nn.Conv2d(12, 6, 1)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.tanh(self.norm(self.grouped(torch.relu(self.first(x)))))
        return self.last(torch.relu(self.pointwise(self.scale * self.depthwise(x))).mean((2, 3)))


class ViT(nn.Module):
    """Patches, a class token, position embeddings, one block with attention written out, a head."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 5, dim))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, 7)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        shares = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(-1)
        x = x + self.projection((shares @ v).transpose(1, 2).reshape(batch, tokens, dim))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x)[:, 0])


class GPT(nn.Module):
    """Token and position embeddings, one causal block as in GPT-2, the head tied to the embedding."""

    def __init__(self, dim=24, heads=3, vocabulary=20, length=9):
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim, bias=False)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.mlp_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        batch, length = tokens.shape
        x = self.wte(tokens) + self.wpe(torch.arange(length, device=tokens.device))
        dim = x.shape[-1]
        parts = self.c_attn(self.ln_1(x)).split(dim, dim=2)
        q, k, v = (part.view(batch, length, self.heads, dim // self.heads).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, dim))
        x = x + self.mlp_proj(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return self.lm_head(self.ln_f(x))


class Siren(nn.Module):
    """sin(30 (W x + b)), and an offset of the output."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 8), nn.Linear(8, 7), nn.Linear(7, 1)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x) + 0.5


class Dense(nn.Module):
    """A layer that reads two others side by side, and an addition after an activation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x):
        a = torch.relu(self.a(x))
        b = a + torch.relu(self.b(a))
        return self.d(torch.tanh(self.c(torch.cat([a, b], dim=1))))


class SideBySide(nn.Module):
    """A batch norm over two layers side by side, coarse positions repeated, prepared inputs, log-probabilities."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3, padding=1)
        self.last = nn.Linear(5, 2)
        self.register_buffer("mean", torch.tensor(0.3))

    def forward(self, x):
        a = torch.relu(self.a((x - self.mean) / 2))
        b = functional.interpolate(torch.relu(self.b(functional.max_pool2d(a, 2))), scale_factor=2)
        x = torch.relu(self.c(torch.relu(self.norm(torch.cat([a, b], dim=1)))))
        return torch.log_softmax(self.last(x.mean((2, 3))), dim=1)


class Manual(nn.Module):
    """Matrix products with parameters, attention of PyTorch's module with its weights returned."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.RMSNorm(16)
        self.last = nn.Parameter(torch.randn(16, 3))

    def forward(self, x):
        x = x @ self.weight + self.bias
        return self.norm(x + self.attention(x, x, x)[0]) @ self.last


def mobile():
    """Inverted residuals without the residual: depthwise convolutions between batch norms."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)),
        *(nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def cnn():
    """Convolutions, pooling, flattening, linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, bias=False), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(8 * 4 * 4, 10), nn.BatchNorm1d(10, affine=False), nn.ReLU(), nn.Dropout()),
        nn.Linear(10, 3),
    )


def encoder(norm_first):
    """PyTorch's own block."""
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first, activation="gelu")


ARCHITECTURES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2)), (4, 3)),
    "siren": (Siren, (5, 2)),
    "cnn": (cnn, (2, 1, 14, 14)),
    "dense": (Dense, (4, 3)),
    "grouped": (Grouped, (2, 3, 8, 8)),
    "resnet18": (lambda: ResNet18(dim=6, num_classes=5), (2, 3, 32, 32)),
    "resnet, two stages": (lambda: ResNet18(dim=4, num_classes=5, num_stages=2), (2, 3, 16, 16)),
    "side by side": (SideBySide, (2, 1, 8, 8)),
    "mobile": (mobile, (2, 3, 9, 9)),
    "manual": (Manual, (2, 5, 6)),
    "encoder": (lambda: encoder(False), (2, 5, 32)),
    "encoder, norm first": (lambda: encoder(True), (2, 5, 32)),
    "vit": (ViT, (2, 3, 8, 8)),
    "gpt": (GPT, (2, 9)),
}
"""Name -> how to make the module, and the shape of its input."""


def architecture(name):
    """A module in float64, with statistics and biases that are not those it starts with, and an input of it."""
    make, shape = ARCHITECTURES[name]
    torch.manual_seed(0)
    module = make().double().eval()
    with torch.no_grad():
        for key, buffer in module.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_()
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-1, 1)
    x = torch.randint(0, 20, shape) if name == "gpt" else torch.randn(shape, dtype=torch.float64)
    return module, x


def traced(name):
    """A module, its parameters and an input."""
    module, x = architecture(name)
    return module, from_module(module, x), x


def transformer():
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True, activation="gelu"), (1, 3, 8)


class Skips(nn.Module):
    """Convolutions of several sizes and groups, of which one reads the network's input beside hidden channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.first, self.second = nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(8, 5, 5, padding=2)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Linear(5, 3)

    def forward(self, x):
        both = torch.cat([torch.relu(self.norm(self.first(torch.relu(self.stem(x))))), x], dim=1)
        return self.last(torch.tanh(self.second(both)).mean((2, 3)))


def skips():
    return Skips(), (1, 2, 6, 6)


def networks(make):
    """Two networks."""
    module, shape = make()
    params = from_module(module.eval(), torch.randn(shape)).map(torch.Tensor.double)
    return NetParams.cat([params, params.map(lambda x: x + 0.1 * torch.rand_like(x))]).with_batch_norm_folded()
