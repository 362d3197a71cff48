"""The vocabulary that all rooms share. Nothing here imports another room."""
