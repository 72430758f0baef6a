"""The commands of ``afl-jax``, one file each."""
