"""Trains vit-pytorch's own ViT, SimpleViT and DeepViT on scikit-learn's handwritten digits: checkpoints for converting.

The images come with scikit-learn, so nothing is downloaded. The held-out digits do not pick the epoch: the weights that
are saved are the last one's.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich_click as click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from vit_pytorch.deepvit import DeepViT
from vit_pytorch.simple_vit import SimpleViT
from vit_pytorch.vit import ViT

from convert.command_line.demo import digits

# vit-pytorch normalises each patch on its own, and 2x2 pixels then say too little: 91 % right, against 98 % with 4x4.
# heads x dim_head is 48 and no multiple of 64, so vit-pytorch's default dim_head is not a guess that fits.
SHARED = {'image_size': 8, 'patch_size': 4, 'channels': 1, 'num_classes': 10, 'dim': 48, 'depth': 4, 'mlp_dim': 96}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    # a smaller one, which keeps its file small
    'vit': (
        ViT,
        {**SHARED, 'dim': 32, 'depth': 3, 'mlp_dim': 64, 'heads': 2, 'dim_head': 16, 'dropout': 0.1, 'emb_dropout': 0.1}
        | {'pool': 'mean'},
    ),
    'simple_vit': (SimpleViT, {**SHARED, 'heads': 3, 'dim_head': 16}),
    'deep_vit': (
        DeepViT,
        {**SHARED, 'heads': 4, 'dim_head': 12, 'pool': 'cls', 'dropout': 0.1, 'emb_dropout': 0.1},
    ),
}

BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
STILL = 0.5  # the share of the images that no shift moves
BLACK = -1.0  # what a shift moves in at the edge, after normalisation


def shifted(images: Tensor) -> Tensor:
    """About half of the images moved by -1, 0 or 1 pixel along each axis, at random."""
    rows, columns = images.shape[-2:]
    padded = functional.pad(images, (1, 1, 1, 1), value=BLACK)
    windows = padded.unfold(2, rows, 1).unfold(3, columns, 1)  # (n, channel, 3, 3, row, column)
    down, right = torch.where(torch.rand(len(images)) < STILL, 1, torch.randint(3, (2, len(images))))
    return windows[torch.arange(len(images)), :, down, right]


def epochs_of_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, epochs: int
) -> Iterator[float]:
    """Trains, and gives the mean loss after each epoch; the learning rate falls to zero along a cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loss_of = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    for _ in range(epochs):
        model.train()
        total = 0.0
        for batch in torch.split(torch.randperm(len(images)), BATCH):
            loss = loss_of(model(shifted(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        schedule.step()
        yield total / len(images)


@torch.inference_mode()
def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images that the model names rightly."""
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


@click.command()
@click.option('--epochs', type=click.IntRange(1), default=120, show_default=True, help='Passes over the digits.')
@click.option('--out', type=click.Path(path_type=Path), default=Path(__file__).parent, help='Where the files go.')
@click.option('--seed', default=0, show_default=True, help='Of the weights, the batches, the shifts, the dropout.')
def main(epochs: int, out: Path, seed: int) -> None:
    """Train ViT, SimpleViT and DeepViT on handwritten digits, and save each as .pt and .safetensors."""
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and the sums keep their order
    out.mkdir(parents=True, exist_ok=True)
    images, labels, held_out_images, held_out_labels = map(torch.from_numpy, digits())
    images, held_out_images = (pixels.permute(0, 3, 1, 2).contiguous() for pixels in (images, held_out_images))
    console = Console()
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('loss {task.fields[loss]:.3f}'))

    for name, (build, arguments) in MODELS.items():
        torch.manual_seed(seed)  # for each model: neither depends on which was trained before it
        model = build(**arguments)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        start = time.perf_counter()
        with Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            task = progress.add_task(name, total=epochs, loss=float('nan'))
            for loss in epochs_of_training(model, optimizer, images, labels, epochs):
                progress.update(task, advance=1, loss=loss)
        seconds = time.perf_counter() - start

        accuracy = accuracy_of(model, held_out_images, held_out_labels)
        weights = model.state_dict()
        checkpoint = {
            'epoch': epochs,
            'model_state_dict': weights,
            'optimizer_state_dict': optimizer.state_dict(),
            'accuracy': accuracy,
        }
        torch.save(checkpoint, out / f'{name}.pt')
        save_file(weights, out / f'{name}.safetensors')

        parameters = sum(parameter.numel() for parameter in model.parameters())
        console.print(
            f'{name}: {accuracy:.2%} of {len(held_out_labels)} held-out digits right, '
            f'{parameters:,} parameters, {seconds:.0f} s',
            highlight=False,
        )


if __name__ == '__main__':
    main()
