"""What a user may have given instead of the folder that a command asks for."""

from pathlib import Path

from peanut_jax.interop.peft_folder import CONFIG_FILE, WEIGHTS_FILE


def is_adapter(source: str) -> bool:
    """Whether a local folder holds an adapter, and not a model."""
    folder = Path(source)
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def check_adapter(source: str, argument: str = "--adapter") -> None:
    """Refuses a local folder that does not hold a whole adapter; hub names are left to the reader.

    Args:
        argument: What the user calls the folder.

    Raises:
        FileNotFoundError: a folder that holds something else.
    """
    folder = Path(source)
    if not folder.is_dir() or all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return
    wanted = f"{argument} takes the folder of an adapter, which save_adapter, PEFT or `peanut-jax train` wrote"
    if (folder / CONFIG_FILE).is_file():
        pickles = sorted(file.name for file in folder.glob("adapter_model.*") if file.suffix in (".bin", ".pt"))
        if pickles:
            raise FileNotFoundError(
                f"{source!r} has no {WEIGHTS_FILE}. {pickles[0]} is a pickle file, which can run code and is not read: "
                "load the adapter in PEFT once and save it again, which writes safetensors"
            )
        raise FileNotFoundError(f"{source!r} has no {WEIGHTS_FILE}, so it is half an adapter; copy it there too")
    within = sorted(file.parent for file in folder.glob(f"*/{CONFIG_FILE}"))
    if within:
        raise FileNotFoundError(f"{source!r} has no {CONFIG_FILE}, but {str(within[0])!r} has one; give that folder")
    if (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source!r} holds a model, not an adapter; {wanted}")
    what = "is an empty folder" if not any(folder.iterdir()) else f"has no {CONFIG_FILE}"
    raise FileNotFoundError(f"{source!r} {what}; {wanted}")
