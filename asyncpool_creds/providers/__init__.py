"""Sources of credentials, one file each; a source's SDK is imported by its own file only."""
