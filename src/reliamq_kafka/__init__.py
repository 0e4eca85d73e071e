"""Apache Kafka as a backend of reliamq.  Not registered as a plugin yet: it can publish, and not consume."""
