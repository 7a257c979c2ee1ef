"""Every error a caller can get, in one tree. Each class knows its own code, HTTP status and reason.

Pure: knows no transport, so an engine may raise these too. `rpc.py` turns them into gRPC statuses, `channel.py` back
into these classes, the HTTP edge into RFC 9457 documents. The reason is the contract: stable, unique, the same
everywhere.

FabulaError
├── InvalidArgument               INVALID_ARGUMENT                400  change the request: the message says what
│   ├── UnknownField              UNKNOWN_FIELD                   400
│   ├── ValueOutOfRange           VALUE_OUT_OF_RANGE              400
│   ├── RequestIdInvalid          REQUEST_ID_INVALID              400
│   ├── PageTokenInvalid          PAGE_TOKEN_INVALID              400
│   ├── PackUnknown               PACK_UNKNOWN                    400
│   ├── MethodUnknown             METHOD_UNKNOWN                  400
│   ├── ExampleStoryRefused       EXAMPLE_STORY_REFUSED           400
│   ├── TensorInvalid             TENSOR_INVALID                  400
│   ├── CaptionEmpty              CAPTION_EMPTY                   400
│   ├── CaptionTooLong            CAPTION_TOO_LONG                400
│   ├── CaptionCharactersInvalid  CAPTION_CHARACTERS_INVALID      400
│   ├── DescriptionEmpty          DESCRIPTION_EMPTY               400
│   ├── DescriptionTooLong        DESCRIPTION_TOO_LONG            400
│   ├── TooManyReferences         TOO_MANY_REFERENCES             400
│   ├── TooFewReferences          TOO_FEW_REFERENCES              400
│   ├── CharacterWeightsUnusable  CHARACTER_WEIGHTS_UNUSABLE      400
│   ├── CharacterRepeated         CHARACTER_REPEATED              400
│   ├── ImageMissing              IMAGE_MISSING                   400
│   ├── ImageUnreadable           IMAGE_UNREADABLE                400
│   ├── ImageTooLarge             IMAGE_TOO_LARGE                 413
│   └── ImageTooSmall             IMAGE_TOO_SMALL                 400
├── Unauthenticated               UNAUTHENTICATED                 401
│   └── InstallationTokenInvalid  INSTALLATION_TOKEN_INVALID      401
├── PermissionDenied              PERMISSION_DENIED               403
│   ├── HostNotAllowed            HOST_NOT_ALLOWED                403
│   └── OriginNotAllowed          ORIGIN_NOT_ALLOWED              403
├── NotFound                      NOT_FOUND                       404
│   ├── StoryNotFound             STORY_NOT_FOUND                 404
│   ├── FrameNotFound             FRAME_NOT_FOUND                 404
│   ├── ImageNotFound             IMAGE_NOT_FOUND                 404
│   ├── ModelUnknown              MODEL_UNKNOWN                   404
│   ├── CharacterWeightsUnknown   CHARACTER_WEIGHTS_UNKNOWN       404
│   ├── CustomizationJobNotFound  CUSTOMIZATION_JOB_NOT_FOUND     404
│   ├── CheckpointNotFound        CHECKPOINT_NOT_FOUND            404
│   ├── CharacterVersionNotFound  CHARACTER_VERSION_NOT_FOUND     404
│   ├── CharacterNotFound         CHARACTER_NOT_FOUND             404
│   └── ObjectNotFound            OBJECT_NOT_FOUND                404
├── AlreadyExists                 ALREADY_EXISTS                  409
│   └── IdempotencyKeyReused      IDEMPOTENCY_KEY_REUSED          422
├── FailedPrecondition            FAILED_PRECONDITION             409  something else must happen first
│   ├── StoryNotEnded             STORY_NOT_ENDED                 409
│   ├── StaleParent               STALE_PARENT                    409
│   ├── StoryTooLong              STORY_TOO_LONG                  409
│   ├── FeatureMissing            FEATURE_MISSING                 409
│   ├── CharacterOfAnotherPack    CHARACTER_OF_ANOTHER_PACK       409
│   ├── CharacterVersionDeleted   CHARACTER_VERSION_DELETED       409
│   └── JobStateUnsuitable        JOB_STATE_UNSUITABLE            409
├── ResourceExhausted             RESOURCE_EXHAUSTED              429  try again only when `retry_after_s` is set
│   ├── QueueFull                 QUEUE_FULL                      429
│   ├── DeadlineUnreachable       DEADLINE_UNREACHABLE            429
│   └── StorageFull               OBJECT_STORE_FULL               507
├── Unavailable                   UNAVAILABLE                     503  try again after a pause
│   ├── ReplicaLost               REPLICA_LOST                    503
│   ├── EngineDead                ENGINE_DEAD                     503
│   └── ShuttingDown              SHUTTING_DOWN                   503
├── DeadlineExceeded              DEADLINE_EXCEEDED               504
├── Cancelled                     CANCELLED                       499
├── Unimplemented                 UNIMPLEMENTED                   501
├── DataLoss                      DATA_LOSS                       500
│   └── ObjectCorrupt             OBJECT_CORRUPT                  500
└── Internal                      INTERNAL                        500  a bug: logged with an id, not shown
    ├── RenderFailed              RENDER_FAILED                   500
    ├── CaptionNotWritten         CAPTION_NOT_WRITTEN             500
    └── PoisonRequest             POISON_REQUEST                  500
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

DOMAIN = "fabula"  # ErrorInfo.domain of every error


class Code(StrEnum):
    """The gRPC status codes by name; this module does not import grpc."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request that is wrong, and what would be right."""

    field: str
    description: str


class FabulaError(Exception):
    """Base of the tree. Raise a subclass.

    `metadata` repeats the message's changing values for programs; `retry_after_s` is set only when trying the very same
    request again after so many seconds can work.
    """

    code: ClassVar[Code] = Code.INTERNAL
    http_status: ClassVar[int] = 500
    reason: str = "INTERNAL"  # an error sent by a newer peer may carry a reason this tree does not know yet
    default_retry_after_s: ClassVar[float | None] = None

    def __init__(
        self,
        message: str = "",
        *,
        metadata: Mapping[str, str] | None = None,
        field_violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        self.message = message or first_line(type(self).__doc__)
        self.metadata: dict[str, str] = dict(metadata or {})
        self.field_violations: tuple[FieldViolation, ...] = tuple(field_violations)
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s
        super().__init__(self.message)


def first_line(doc: str | None) -> str:
    """The sentence a class says about itself: the message when none is given."""
    return (doc or "").strip().split("\n", 1)[0]


class InvalidArgument(FabulaError):
    """The request is wrong as it stands."""

    code = Code.INVALID_ARGUMENT
    http_status = 400
    reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str = "",
        *,
        field: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        """`field` is the short way to name the one field that is wrong."""
        super().__init__(message, metadata=metadata, field_violations=field_violations, retry_after_s=retry_after_s)
        if field and not self.field_violations:
            self.field_violations = (FieldViolation(field, self.message),)
            self.metadata.setdefault("field", field)


class UnknownField(InvalidArgument):
    """The request has a field that does not exist. Check its spelling."""

    reason = "UNKNOWN_FIELD"


class ValueOutOfRange(InvalidArgument):
    """A value is outside its range."""

    reason = "VALUE_OUT_OF_RANGE"


class RequestIdInvalid(InvalidArgument):
    """A request id is 1 to 255 printable ASCII characters."""

    reason = "REQUEST_ID_INVALID"


class PageTokenInvalid(InvalidArgument):
    """The page token is not one that a list call returned."""

    reason = "PAGE_TOKEN_INVALID"


class PackUnknown(InvalidArgument):
    """No loaded pack has this name."""

    reason = "PACK_UNKNOWN"


class MethodUnknown(InvalidArgument):
    """There is no customization method of this name."""

    reason = "METHOD_UNKNOWN"


class ExampleStoryRefused(InvalidArgument):
    """The example story cannot be learned from as it is. Mend what is told, or accept it where it is a warning."""

    reason = "EXAMPLE_STORY_REFUSED"


class TensorInvalid(InvalidArgument):
    """A tensor of an inference request is not what its model takes."""

    reason = "TENSOR_INVALID"


class CaptionEmpty(InvalidArgument):
    """A caption needs at least one visible character."""

    reason = "CAPTION_EMPTY"


class CaptionTooLong(InvalidArgument):
    """The caption is too long."""

    reason = "CAPTION_TOO_LONG"


class CaptionCharactersInvalid(InvalidArgument):
    """The caption holds control characters. Remove them."""

    reason = "CAPTION_CHARACTERS_INVALID"


class DescriptionEmpty(InvalidArgument):
    """A description needs at least one visible character."""

    reason = "DESCRIPTION_EMPTY"


class DescriptionTooLong(InvalidArgument):
    """The description exceeds the text encoder's window."""

    reason = "DESCRIPTION_TOO_LONG"


class TooManyReferences(InvalidArgument):
    """The pack takes fewer reference frames: the message says how many."""

    reason = "TOO_MANY_REFERENCES"


class TooFewReferences(InvalidArgument):
    """The pack goes on from frames that are there: give it at least as many references as the message says."""

    reason = "TOO_FEW_REFERENCES"


class CharacterWeightsUnusable(InvalidArgument):
    """The character's weights do not fit this pack, or are damaged: the message says which. Train them on this pack."""

    reason = "CHARACTER_WEIGHTS_UNUSABLE"


class CharacterRepeated(InvalidArgument):
    """A story cannot tell two characters of one name apart: ask for one of them."""

    reason = "CHARACTER_REPEATED"


class ImageMissing(InvalidArgument):
    """A picture is needed."""

    reason = "IMAGE_MISSING"


class ImageUnreadable(InvalidArgument):
    """The picture cannot be read. Send a complete PNG, JPEG, WebP, GIF or TIFF file."""

    reason = "IMAGE_UNREADABLE"


class ImageTooLarge(InvalidArgument):
    """The picture is too large."""

    http_status = 413
    reason = "IMAGE_TOO_LARGE"


class ImageTooSmall(InvalidArgument):
    """The picture is too small to be continued."""

    reason = "IMAGE_TOO_SMALL"


class Unauthenticated(FabulaError):
    """The caller did not say who it is."""

    code = Code.UNAUTHENTICATED
    http_status = 401
    reason = "UNAUTHENTICATED"


class InstallationTokenInvalid(Unauthenticated):
    """The installation token is missing or wrong. Both sides must read the same token file."""

    reason = "INSTALLATION_TOKEN_INVALID"


class PermissionDenied(FabulaError):
    """The caller may not do this."""

    code = Code.PERMISSION_DENIED
    http_status = 403
    reason = "PERMISSION_DENIED"


class HostNotAllowed(PermissionDenied):
    """This edge does not answer for the host named in the request. FABULA_STORY_ALLOWED_HOSTS lists those it does."""

    reason = "HOST_NOT_ALLOWED"


class OriginNotAllowed(PermissionDenied):
    """Web pages of this origin may not call this edge. FABULA_STORY_ALLOWED_ORIGINS lists those that may."""

    reason = "ORIGIN_NOT_ALLOWED"


class NotFound(FabulaError):
    """There is no such thing."""

    code = Code.NOT_FOUND
    http_status = 404
    reason = "NOT_FOUND"


class FrameNotFound(NotFound):
    """The story has no drawn frame of this number."""

    reason = "FRAME_NOT_FOUND"


class StoryNotFound(NotFound):
    """There is no story with this id; it may have been deleted."""

    reason = "STORY_NOT_FOUND"


class ImageNotFound(NotFound):
    """This story has no picture with this SHA-256."""

    reason = "IMAGE_NOT_FOUND"


class ModelUnknown(NotFound):
    """No model of the inference protocol has this name and version here."""

    reason = "MODEL_UNKNOWN"


class CharacterWeightsUnknown(NotFound):
    """No character's weights with this SHA-256 are stored here."""

    reason = "CHARACTER_WEIGHTS_UNKNOWN"


class CustomizationJobNotFound(NotFound):
    """There is no customization job with this id; it may have been deleted for good."""

    reason = "CUSTOMIZATION_JOB_NOT_FOUND"


class CheckpointNotFound(NotFound):
    """The job has no checkpoint of this step. List its checkpoints and choose one."""

    reason = "CHECKPOINT_NOT_FOUND"


class CharacterVersionNotFound(NotFound):
    """No character version with this id was published here; it may have been deleted for good."""

    reason = "CHARACTER_VERSION_NOT_FOUND"


class CharacterNotFound(NotFound):
    """Nobody of this name or version was published here: `fabula character versions` lists who was."""

    reason = "CHARACTER_NOT_FOUND"


class ObjectNotFound(NotFound):
    """The object store has no object with this SHA-256."""

    reason = "OBJECT_NOT_FOUND"


class AlreadyExists(FabulaError):
    """It exists already."""

    code = Code.ALREADY_EXISTS
    http_status = 409
    reason = "ALREADY_EXISTS"


class IdempotencyKeyReused(AlreadyExists):
    """This request id was used with another body. Use a new id for a new request."""

    http_status = 422
    reason = "IDEMPOTENCY_KEY_REUSED"


class FailedPrecondition(FabulaError):
    """Something else must happen first."""

    code = Code.FAILED_PRECONDITION
    http_status = 409
    reason = "FAILED_PRECONDITION"


class StoryNotEnded(FailedPrecondition):
    """The story is still being made. Wait until it has ended, or cancel it."""

    reason = "STORY_NOT_ENDED"


class StaleParent(FailedPrecondition):
    """The story changed while the frame was drawn. Nothing was kept; read it again, then repeat the call."""

    reason = "STALE_PARENT"


class StoryTooLong(FailedPrecondition):
    """The story has as many frames as a story can have."""

    reason = "STORY_TOO_LONG"


class FeatureMissing(FailedPrecondition):
    """The story's pack cannot do this here: the message says what. ListBackends says which can."""

    reason = "FEATURE_MISSING"


class CharacterOfAnotherPack(FailedPrecondition):
    """The character was learned on another network than the pack has now: teach them to this one."""

    reason = "CHARACTER_OF_ANOTHER_PACK"


class CharacterVersionDeleted(FailedPrecondition):
    """The character version is deleted: undelete it first."""

    reason = "CHARACTER_VERSION_DELETED"


class JobStateUnsuitable(FailedPrecondition):
    """The job is not in a state for this."""

    reason = "JOB_STATE_UNSUITABLE"


class ResourceExhausted(FabulaError):
    """There is no room."""

    code = Code.RESOURCE_EXHAUSTED
    http_status = 429
    reason = "RESOURCE_EXHAUSTED"


class QueueFull(ResourceExhausted):
    """The queue is full. Nothing was started; try again after a pause."""

    reason = "QUEUE_FULL"
    default_retry_after_s = 1.0


class DeadlineUnreachable(ResourceExhausted):
    """The work would not be done before the call's deadline. Allow more time, or try again when less is waiting."""

    reason = "DEADLINE_UNREACHABLE"


class StorageFull(ResourceExhausted):
    """The object store has no room. Free some space or give it more; stories that wait for it go on by themselves."""

    http_status = 507
    reason = "OBJECT_STORE_FULL"


class Unavailable(FabulaError):
    """A service is not reachable now. Try again after a pause."""

    code = Code.UNAVAILABLE
    http_status = 503
    reason = "UNAVAILABLE"
    default_retry_after_s = 1.0


class ReplicaLost(Unavailable):
    """The replica died while it worked on this. Nothing was kept of it; try again."""

    reason = "REPLICA_LOST"


class EngineDead(Unavailable):
    """The engine behind this service has died and is being replaced. Try again after a pause."""

    reason = "ENGINE_DEAD"
    default_retry_after_s = 5.0


class ShuttingDown(Unavailable):
    """This process is stopping. Try again: another one, or the next one, will answer."""

    reason = "SHUTTING_DOWN"


class DeadlineExceeded(FabulaError):
    """The deadline passed before the work was done."""

    code = Code.DEADLINE_EXCEEDED
    http_status = 504
    reason = "DEADLINE_EXCEEDED"


class Cancelled(FabulaError):
    """The caller cancelled it."""

    code = Code.CANCELLED
    http_status = 499
    reason = "CANCELLED"


class Unimplemented(FabulaError):
    """This method does not exist here."""

    code = Code.UNIMPLEMENTED
    http_status = 501
    reason = "UNIMPLEMENTED"


class DataLoss(FabulaError):
    """Stored data is damaged."""

    code = Code.DATA_LOSS
    http_status = 500
    reason = "DATA_LOSS"


class ObjectCorrupt(DataLoss):
    """A stored object no longer matches its SHA-256. Restore it from a backup."""

    reason = "OBJECT_CORRUPT"


class Internal(FabulaError):
    """Something went wrong inside. The log has the details under the error id."""

    code = Code.INTERNAL
    http_status = 500
    reason = "INTERNAL"


class RenderFailed(Internal):
    """The frame could not be drawn. Try another seed or description."""

    reason = "RENDER_FAILED"


class CaptionNotWritten(Internal):
    """The model wrote nothing. Try another seed, or write the caption yourself."""

    reason = "CAPTION_NOT_WRITTEN"


class PoisonRequest(Internal):
    """This request took a worker down several times and was set aside."""

    reason = "POISON_REQUEST"


def every_error() -> Iterator[type[FabulaError]]:
    """Each class of the tree below its base, parents first."""
    pending: list[type[FabulaError]] = [FabulaError]
    while pending:
        for cls in pending.pop(0).__subclasses__():
            yield cls
            pending.append(cls)


def error_from_reason(
    code: Code,
    reason: str,
    message: str,
    *,
    metadata: Mapping[str, str] | None = None,
    field_violations: Sequence[FieldViolation] = (),
    retry_after_s: float | None = None,
) -> FabulaError:
    """Builds the error that a peer sent: by its reason, or by its code when the reason is newer than this code.

    A retry pause is kept only if the peer sent one, so an unknown peer's silence is never read as advice to retry.
    """
    classes = {cls.reason: cls for cls in every_error()}
    generic = {cls.code: cls for cls in FabulaError.__subclasses__()}
    cls = classes.get(reason) or generic.get(code, Internal)
    error = cls(message, metadata=metadata, field_violations=field_violations)
    error.reason = reason or cls.reason
    error.retry_after_s = retry_after_s
    return error
