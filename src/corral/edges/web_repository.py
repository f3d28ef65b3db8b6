"""What an owner changes about a repository: who may see it, who may help, what its page says, and whether it is there at all.

Each page is one question with one answer, and works without JavaScript. What gives something away or takes it apart (making
public, letting somebody in, deleting) asks for the password when it was typed more than five minutes ago; what takes rights back
never does. For anybody but the owner these pages are not there, whatever is behind them (T29).
"""

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from corral.core.records import Principal
from corral.core.registry import Repository, Right, Visibility
from corral.edges.asgi import MAX_BODY_BYTES, Dialect, Endpoint, caller_of, endpoint, facts_of
from corral.edges.forms import (
    MAX_FORM_BYTES,
    MEMBER,
    Form,
    Stepped,
    StepUp,
    Unproven,
    query_of,
    redirect,
    session_form,
    session_of,
)
from corral.edges.pages import Draft, Pages
from corral.edges.web_models import path_of
from corral.hub.catalog import Catalog
from corral.hub.registry import Registry
from corral.hub.repositories import Repositories, is_hub_namespace
from corral.wire.errors import CorralError
from corral.wire.repositories import RepositoryName, parse_repository

#: What the form calls a right -> words.
_RIGHTS = {Right.PULL: "pull", Right.PUSH: "pull and push"}
_NOTICES = {"collaborator": "They may do that from now on.", "removed": "They may not do that any more."}
#: Codes that say that the caller may not, and codes that say that there is nothing.
_NOT_THERE = frozenset({"name_unknown", "forbidden", "manifest_unknown", "name_invalid"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """A confirmation page. verb: the button's words. is_harmless: it takes rights back, which needs no password."""

    heading: str
    consequence: str
    verb: str
    action: str
    is_harmless: bool = False


class RepositoryPages:
    """Handlers of /settings/models."""

    def __init__(
        self, *, pages: Pages, repositories: Repositories, registry: Registry, catalog: Catalog, step_up: StepUp
    ) -> None:
        self._pages = pages
        self._repositories = repositories
        self._registry = registry
        self._catalog = catalog
        self._step_up = step_up

    def endpoints(self) -> list[Endpoint]:
        """A GET shows what its POST would do. What is done comes last in the address: a name may nest, and hold any of these
        words."""
        base, html = "/settings/models/{namespace}/{name:path}", Dialect.HTML
        shown = [("access", self.show_access), ("publish", self.show_publish), ("hide", self.show_hide)]
        shown += [("readme", self.show_readme), ("tag", self.show_remove_tag), ("delete", self.show_delete)]
        done = [("publish", self.publish), ("hide", self.hide), ("collaborator", self.set_collaborator)]
        done += [("tag", self.remove_tag), ("delete", self.delete)]
        return [
            *(endpoint("GET,HEAD", f"{base}/{last}", handler, MEMBER, dialect=html) for last, handler in shown),
            *(
                endpoint("POST", f"{base}/{last}", handler, MEMBER, dialect=html, max_body_bytes=MAX_FORM_BYTES)
                for last, handler in done
            ),
            # A README has at most 256 KiB, each byte of which takes up to three in a form.
            endpoint("POST", f"{base}/readme", self.save_readme, MEMBER, dialect=html, max_body_bytes=MAX_BODY_BYTES),
        ]

    # ── Who may see it, and who may help ─────────────────────────────────────────────────────────────────────────────

    async def show_access(self, request: Request) -> Response:
        """Visibility, collaborators, and the way to delete it."""
        notice = _NOTICES.get(query_of(request).text("done"), "")
        return await self._access_page(caller_of(request), await self._owned(request, caller_of(request)), Draft(), notice=notice)

    async def _access_page(
        self, caller: Principal, repository: Repository, draft: Draft, *, notice: str = "", status: int = 200
    ) -> Response:
        return self._pages.render(
            "repository_access.html",
            caller=caller,
            status=status,
            repository=repository,
            path=path_of(repository.path),
            base=_base(repository),
            draft=draft,
            notice=notice,
            rights=[(right.value, words) for right, words in _RIGHTS.items()],
            collaborators=[
                (found.account.name, _RIGHTS.get(found.right, "pull"))
                for found in await self._repositories.collaborators(_name(repository), caller)
            ],
            needs_password=self._step_up.is_needed(session_of(caller)),
        )

    async def set_collaborator(self, request: Request) -> Response:
        """Let somebody in, or, without a right, out again."""
        form, caller, _ = session_form(request)
        repository = await self._owned(request, caller)
        if not form.text("right"):
            await self._change_collaborator(request, caller, repository, form, None)
            return redirect(f"{_base(repository)}/access?done=removed")
        right = next((right for right in _RIGHTS if right.value == form.text("right")), None)
        if right is None:
            raise CorralError("bad_request", "the form names a right that does not exist")
        draft = {"account": form.text("account"), "right": right.value}
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            return await self._access_page(caller, repository, Draft(draft, stepped.errors), status=stepped.status)
        return self._step_up.finish(await self._let_in(request, stepped, repository, form, right, Draft(draft)), stepped)

    async def _let_in(
        self, request: Request, stepped: Stepped, repository: Repository, form: Form, right: Right, draft: Draft
    ) -> Response:
        try:
            await self._change_collaborator(request, stepped.caller, repository, form, right)
        except CorralError as error:
            if error.code not in ("not_found", "invalid"):
                raise
            wrong = Draft(draft.values, {"account": error.message})
            return await self._access_page(stepped.caller, repository, wrong, status=422)
        return redirect(f"{_base(repository)}/access?done=collaborator")

    async def _change_collaborator(
        self, request: Request, caller: Principal, repository: Repository, form: Form, right: Right | None
    ) -> None:
        await self._repositories.set_collaborator(
            _name(repository), caller, form.text("account").strip(), right, network=facts_of(request).network
        )

    async def show_publish(self, request: Request) -> Response:
        """What making it public means."""
        caller = caller_of(request)
        repository = await self._owned(request, caller)
        return self._confirm_page(caller, repository, _publish_question(repository), Draft())

    async def publish(self, request: Request) -> Response:
        """Let anybody pull from it."""
        form, caller, _ = session_form(request)
        repository = await self._owned(request, caller)
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            question = _publish_question(repository)
            return self._confirm_page(caller, repository, question, Draft(errors=stepped.errors), status=stepped.status)
        await self._show_to(request, stepped.caller, repository, Visibility.PUBLIC)
        return self._step_up.finish(redirect(f"{path_of(repository.path)}?done=public"), stepped)

    async def show_hide(self, request: Request) -> Response:
        """What making it private means."""
        caller = caller_of(request)
        repository = await self._owned(request, caller)
        return self._confirm_page(caller, repository, _hide_question(repository), Draft())

    async def hide(self, request: Request) -> Response:
        """Let only its own people pull from it."""
        _, caller, _ = session_form(request)
        repository = await self._owned(request, caller)
        await self._show_to(request, caller, repository, Visibility.PRIVATE)
        return redirect(f"{path_of(repository.path)}?done=private")

    async def _show_to(self, request: Request, caller: Principal, repository: Repository, visibility: Visibility) -> None:
        await self._repositories.set_visibility(_name(repository), caller, visibility, network=facts_of(request).network)

    # ── What its page says ───────────────────────────────────────────────────────────────────────────────────────────

    async def show_readme(self, request: Request) -> Response:
        """The README, to be changed."""
        caller = caller_of(request)
        repository = await self._owned(request, caller, Right.PUSH)
        readme = await self._repositories.readme(_name(repository), caller)
        return self._readme_page(caller, repository, Draft({"readme": readme}))

    async def save_readme(self, request: Request) -> Response:
        """Keep it as it was typed."""
        form, caller, _ = session_form(request)
        repository = await self._owned(request, caller, Right.PUSH)
        # Browsers send CR LF; a file has LF.
        text = form.text("readme").replace("\r\n", "\n")
        try:
            await self._repositories.set_readme(_name(repository), caller, text)
        except CorralError as error:
            if error.code not in ("too_large", "invalid"):
                raise
            return self._readme_page(caller, repository, Draft({"readme": text}, {"readme": error.message}), status=422)
        return redirect(path_of(repository.path))

    def _readme_page(self, caller: Principal, repository: Repository, draft: Draft, *, status: int = 200) -> Response:
        return self._pages.render(
            "repository_readme.html",
            caller=caller,
            status=status,
            repository=repository,
            path=path_of(repository.path),
            action=f"{_base(repository)}/readme",
            draft=draft,
        )

    # ── Whether it is there ──────────────────────────────────────────────────────────────────────────────────────────

    async def show_remove_tag(self, request: Request) -> Response:
        """What removing a tag means."""
        caller = caller_of(request)
        repository = await self._owned(request, caller)
        tag = await self._tag(request, repository, caller)
        return self._confirm_page(caller, repository, _tag_question(repository, tag), Draft())

    async def remove_tag(self, request: Request) -> Response:
        """Remove a tag, and nothing else."""
        form, caller, _ = session_form(request)
        repository = await self._owned(request, caller)
        tag = await self._tag(request, repository, caller)
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            question = _tag_question(repository, tag)
            return self._confirm_page(caller, repository, question, Draft(errors=stepped.errors), status=stepped.status)
        await self._registry.remove_manifest(_name(repository), tag, stepped.caller)
        return self._step_up.finish(redirect(f"{path_of(repository.path)}?done=tag"), stepped)

    async def show_delete(self, request: Request) -> Response:
        """What deleting means; the name is typed to confirm it."""
        caller = caller_of(request)
        return self._delete_page(caller, await self._owned(request, caller), Draft())

    async def delete(self, request: Request) -> Response:
        """Delete the repository with its tags."""
        form, caller, _ = session_form(request)
        repository = await self._owned(request, caller)
        typed = form.text("confirm").strip()
        if typed.lower() != repository.path.lower():
            draft = Draft({"confirm": typed}, {"confirm": f"Type {repository.path} to delete it."})
            return self._delete_page(caller, repository, draft, status=422)
        stepped = await self._step_up.check(request, form, caller)
        if isinstance(stepped, Unproven):
            return self._delete_page(caller, repository, Draft({"confirm": typed}, stepped.errors), status=stepped.status)
        await self._repositories.remove(_name(repository), stepped.caller, network=facts_of(request).network)
        # Of what is the hub's own, the library is the page that is there whatever else is.
        listing = "/library" if is_hub_namespace(repository.namespace) else path_of(repository.namespace)
        return self._step_up.finish(redirect(f"{listing}?done=deleted"), stepped)

    def _delete_page(self, caller: Principal, repository: Repository, draft: Draft, *, status: int = 200) -> Response:
        return self._pages.render(
            "repository_delete.html",
            caller=caller,
            status=status,
            repository=repository,
            path=path_of(repository.path),
            action=f"{_base(repository)}/delete",
            draft=draft,
            needs_password=self._step_up.is_needed(session_of(caller)),
        )

    # ── What they share ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _owned(self, request: Request, caller: Principal, right: Right = Right.DELETE) -> Repository:
        """The repository of the address, for somebody with that right. Raises: not_found for everybody else."""
        try:
            name = parse_repository(f"{request.path_params['namespace']}/{request.path_params['name']}")
            return await self._repositories.find_existing(name, right, caller)
        except CorralError as error:
            if error.code not in _NOT_THERE:
                raise
            raise CorralError("not_found") from error

    async def _tag(self, request: Request, repository: Repository, caller: Principal) -> str:
        """The tag of the address. Raises: not_found."""
        asked = query_of(request).text("name")
        view = await self._catalog.view(_name(repository), caller, tag=asked) if asked else None
        if view is None or view.chosen is None:
            raise CorralError("not_found")
        return view.chosen.name

    def _confirm_page(
        self, caller: Principal, repository: Repository, question: _Question, draft: Draft, *, status: int = 200
    ) -> Response:
        return self._pages.render(
            "confirm.html",
            caller=caller,
            status=status,
            draft=draft,
            needs_password=not question.is_harmless and self._step_up.is_needed(session_of(caller)),
            heading=question.heading,
            consequence=question.consequence,
            action=question.action,
            verb=question.verb,
            is_harmless=question.is_harmless,
            back=path_of(repository.path),
            keep="Leave it",
        )


def _publish_question(repository: Repository) -> _Question:
    return _Question(
        heading=f"Make {repository.path} public?",
        consequence="Anybody who reaches this hub can then see its page and pull every tag of it, without an account. You can"
        " make it private again, but what was pulled meanwhile stays where it is.",
        verb="Make public",
        action=f"{_base(repository)}/publish",
    )


def _hide_question(repository: Repository) -> _Question:
    return _Question(
        heading=f"Make {repository.path} private?",
        consequence="For everybody but you and its collaborators it is gone from the next request on: its page, its tags and its"
        " place in search. Copies that were pulled before stay where they are.",
        verb="Make private",
        action=f"{_base(repository)}/hide",
        is_harmless=True,
    )


def _tag_question(repository: Repository, tag: str) -> _Question:
    return _Question(
        heading=f"Remove the tag {tag}?",
        consequence=f"Nobody can pull {repository.path}:{tag} any more. Other tags stay, also those with the same content.",
        verb="Remove tag",
        action=f"{_base(repository)}/tag?name={tag}",
    )


def _base(repository: Repository) -> str:
    """What the addresses of its forms begin with."""
    return f"/settings/models{path_of(repository.path)}"


def _name(repository: Repository) -> RepositoryName:
    return RepositoryName(repository.namespace, repository.name)
