"""One request, stage by stage."""
