"""What is sent to a server and read from it."""
