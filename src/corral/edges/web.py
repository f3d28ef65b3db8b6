"""The pages of the hub: what a browser gets. This module only puts them together; each family has a module of its own.

`pages` renders, `forms` reads and guards; the `web_*` modules hold the
handlers. Pages work without JavaScript: every action is a link to a page or a form that posts.
"""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from corral.core.policy import PUBLIC
from corral.core.ports import AuditLog, Clock, HostedStore, UsageStore
from corral.core.scrubbing import HurtBlobs
from corral.edges.asgi import Dialect, Endpoint, endpoint
from corral.edges.forms import Cookies, StepUp
from corral.edges.pages import Pages, StaticFile, static_files
from corral.edges.web_account import AccountPages
from corral.edges.web_admin import AdminPages
from corral.edges.web_connect import ConnectPages
from corral.edges.web_keys import KeyPages
from corral.edges.web_models import ModelPages, Shelf
from corral.edges.web_repository import RepositoryPages
from corral.edges.web_settings import SettingsPages
from corral.hub.accounts import Accounts
from corral.hub.catalog import Catalog
from corral.hub.credentials import Credentials
from corral.hub.hosting import Hosting
from corral.hub.quotas import Quotas
from corral.hub.registry import Registry
from corral.hub.repositories import Repositories

#: Pages without end or without anything to find, and what programs talk to.
_NOT_FOR_ROBOTS = ("search", "signin", "signup", "connect", "settings", "admin", "api", "v1", "v2")
# By their ends, since accounts may have names that begin like these. Source: RFC 9309 2.2.3.
_ROBOTS = "User-agent: *\n" + "".join(f"Disallow: /{word}{end}\n" for word in _NOT_FOR_ROBOTS for end in ("$", "?", "/"))


def web_endpoints(
    *,
    accounts: Accounts,
    credentials: Credentials,
    hosting: HostedStore,
    repositories: Repositories,
    registry: Registry,
    catalog: Catalog,
    quotas: Quotas,
    hurt_blobs: HurtBlobs,
    usage: UsageStore,
    audit: AuditLog,
    public_url: str,
    clock: Clock,
    sign_up_open: bool,
) -> list[Endpoint]:
    """Every route a browser uses. Goes behind the other route lists: its last rows match nearly any path."""
    pages = Pages(public_url=public_url, clock=clock, sign_up_open=sign_up_open)
    cookies = Cookies(public_url=public_url, clock=clock)
    step_up = StepUp(accounts=accounts, cookies=cookies, clock=clock)
    shelf = Shelf(Hosting(hosting))
    account_pages = AccountPages(
        pages=pages, accounts=accounts, cookies=cookies, public_url=public_url, sign_up_open=sign_up_open
    )
    settings_pages = SettingsPages(
        pages=pages,
        accounts=accounts,
        credentials=credentials,
        repositories=repositories,
        quotas=quotas,
        hurt_blobs=hurt_blobs,
        usage=usage,
        cookies=cookies,
        step_up=step_up,
        clock=clock,
    )
    key_pages = KeyPages(pages=pages, credentials=credentials, usage=usage, shelf=shelf, step_up=step_up, clock=clock)
    admin_pages = AdminPages(
        pages=pages,
        accounts=accounts,
        credentials=credentials,
        quotas=quotas,
        hurt_blobs=hurt_blobs,
        usage=usage,
        audit=audit,
        step_up=step_up,
        clock=clock,
    )
    repository_pages = RepositoryPages(
        pages=pages, repositories=repositories, registry=registry, catalog=catalog, step_up=step_up
    )
    return [
        *(endpoint("GET,HEAD", file.path, _sender(file), PUBLIC, dialect=Dialect.TEXT) for file in static_files().values()),
        endpoint("GET,HEAD", "/robots.txt", send_robots, PUBLIC, dialect=Dialect.TEXT),
        *account_pages.endpoints(),
        *ConnectPages(pages=pages, credentials=credentials, step_up=step_up).endpoints(),
        *settings_pages.endpoints(),
        *key_pages.endpoints(),
        *admin_pages.endpoints(),
        *repository_pages.endpoints(),
        *ModelPages(
            pages=pages, accounts=accounts, quotas=quotas, shelf=shelf, catalog=catalog, public_url=public_url
        ).endpoints(),
    ]


async def send_robots(request: Request) -> Response:
    """What crawlers may read: the pages of models. Nothing is hidden by it; what is private is not there for them anyway."""
    return Response(_ROBOTS, headers={"Cache-Control": "public, max-age=86400"}, media_type="text/plain")


def _sender(file: StaticFile) -> Callable[[Request], Awaitable[Response]]:
    async def send_file(request: Request) -> Response:
        return file.response()

    return send_file
