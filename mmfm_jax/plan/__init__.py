"""A step compiled for machines that are not here: does it fit, how long does it take, what does it cost."""
