"""The server that other tests stand on."""

import psycopg


def test_each_test_gets_an_empty_database_of_a_real_server(postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url) as connection:
        (version,) = connection.execute("SELECT version()").fetchone() or ("",)
        (tables,) = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() or (-1,)

    assert version.startswith("PostgreSQL")
    assert tables == 0
