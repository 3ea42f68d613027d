"""What every room uses: errors and messages, files, the config, the machine."""
