"""What every service needs and no service is: errors, RPC boundary, config, telemetry, object store."""
