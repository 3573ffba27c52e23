"""Work on what strangers wrote, in a process that can do nothing but answer."""
