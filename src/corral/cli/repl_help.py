"""The texts behind `/?` in a conversation. Tables, nothing else."""

HELP = """\
Commands:
  /set            Change this session: parameters, system message, modes
  /show           Show the model: info, parameters, template and more
  /load <model>   Go on with another model, with nothing said yet
  /save <model>   Keep this conversation and its settings as a model
  /clear          Forget what was said
  /list           List installed models
  /bye            Leave (also /exit, Ctrl-d)
  /?, /help       This help; /? set, /? show, /? shortcuts say more

\"\"\" begins and ends a message of several lines; Ctrl-j adds one line more.
"""

MEDIA_HELP = "The path of a .jpg, .png, .webp or .wav file in a message sends it along.\n"

SET_HELP = """\
Commands:
  /set parameter <name> <value>   Set an option; alone, lists the common ones
  /set system <text>              Set the system message; \"\" for none
  /set format json                Have answers in JSON; or /set noformat
  /set think [level]              Have the model think: low, medium, high or max
  /set nothink                    Have it answer at once
  /set verbose                    Show counts and speeds; or /set quiet
  /set wordwrap                   Break lines between words; or /set nowordwrap
  /set history                    Keep what you type; or /set nohistory
"""

PARAMETER_HELP = """\
Parameters, as /set parameter <name> <value>:
  temperature <float>      How freely words are chosen; 0 takes the likeliest
  top_k <int>              Choose among that many words only
  top_p <float>            Choose among the likeliest of that sum
  min_p <float>            Leave out what is that much less likely
  seed <int>               The same number gives the same answer
  num_predict <int>        At most that many tokens in an answer
  num_ctx <int>            Tokens that the model keeps in sight
  repeat_penalty <float>   How much to avoid repetition; 1 not at all
  repeat_last_n <int>      How far back repetition is looked for
  num_gpu <int>            Layers on the GPU
  stop <text> [<text>..]   End an answer there; \"in quotes\" with blanks
"""

SHOW_HELP = """\
Commands:
  /show info         Architecture, size, context, capabilities
  /show license      Licence
  /show modelfile    Modelfile that makes this model
  /show parameters   Parameters of the model, and those set here
  /show system       System message
  /show template     Prompt template
"""

SHORTCUTS = """\
Keys:
  Ctrl-a, Ctrl-e    To the beginning, to the end of the line
  Ctrl-b, Ctrl-f    Left, right; Alt-b and Alt-f by a word
  Ctrl-k, Ctrl-u    Delete to the end, to the beginning of the line
  Ctrl-w            Delete the word before
  Ctrl-j            Another line
  Up, Down          What you typed before; Ctrl-r searches it
  Tab               Complete a command
  Ctrl-l            Clear the screen
  Ctrl-g            Write the message in your editor
  Ctrl-c            Stop an answer; drop what is typed
  Ctrl-d            Leave
"""
