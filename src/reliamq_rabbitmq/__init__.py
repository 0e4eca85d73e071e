"""RabbitMQ as a backend of reliamq."""
