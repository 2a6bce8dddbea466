"""The base install's own scene: a seven-joint arm over a table of coloured objects, with language tasks."""
