from stages.runtime.server.model import Model as Model
from stages.runtime.server.model import Reply as Reply
from stages.runtime.server.model import Stream as Stream
from stages.runtime.server.model import load as load
