"""Options of a run that compiles and trains in seconds: a tiny network, a tiny phantom."""

TINY = [
    *("--model.name", "resnet18_unet", "--model.width", "4"),
    *("--model.decoder-features", "8", "8", "4", "4", "4"),
    *(
        "--model.strides",
        *["2", "2", "1", "2", "2", "2", "1", "1", "1", "2", "2", "2", "1", "1", "1"],
    ),
    *("--batch-size", "2", "--num-epochs", "2", "--eval-every", "1", "--num-devices", "1"),
    *("--optimizer.schedule", "constant"),
]
PHANTOM = ["--data.shape", "16", "16", "8", "--data.num-train", "4", "--data.num-val", "3"]
