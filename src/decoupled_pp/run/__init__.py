"""What a run keeps and shows: its folder, log, terminal view, pictures, trace, report and checkpoints."""
