"""One file a method; the file name is the registry and its `Config` the schema of the `objective:` node."""
