"""What the plugin library and the graph agree on."""
