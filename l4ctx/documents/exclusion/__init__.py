"""Which files of a folder are left out: what git ignores, by git itself or by its rules."""
