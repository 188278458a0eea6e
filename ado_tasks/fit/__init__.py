"""What a network asks of a machine: its work, its memory, a prediction of its time, and the settings that fit."""
