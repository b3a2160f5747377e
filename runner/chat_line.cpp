#include "runner/chat_line.h"

#include "runner/str_cat.h"

namespace mvlm {
namespace {

constexpr std::string_view kSpace = " \t\r\n\v\f";

std::string_view Trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) {
    return {};
  }
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

std::string_view Unquote(std::string_view text) {
  const bool quoted =
      text.size() >= 2 && (text[0] == '"' || text[0] == '\'') && text.back() == text[0];
  return quoted ? text.substr(1, text.size() - 2) : text;
}

}  // namespace

Result<ChatLine> ParseChatLine(std::string_view line) {
  using Kind = ChatLine::Kind;
  const std::string_view text = Trim(line);
  if (text.empty()) {
    return ChatLine{};
  }
  if (text[0] != '/') {
    return ChatLine{Kind::kQuestion, std::string(text)};
  }
  if (text.substr(0, 2) == "//") {
    return ChatLine{Kind::kQuestion, std::string(text.substr(1))};
  }
  const std::string_view command = text.substr(0, text.find_first_of(kSpace));
  const std::string_view argument = Unquote(Trim(text.substr(command.size())));
  if (command == "/image") {
    if (argument.empty()) {
      return InvalidInput("/image needs the path of a JPEG or PNG file, e.g. /image cat.jpg");
    }
    return ChatLine{Kind::kImage, std::string(argument)};
  }
  ChatLine parsed;
  if (command == "/reset") {
    parsed.kind = Kind::kReset;
  } else if (command == "/stats") {
    parsed.kind = Kind::kStats;
  } else if (command == "/help") {
    parsed.kind = Kind::kHelp;
  } else if (command == "/quit") {
    parsed.kind = Kind::kQuit;
  } else {
    return InvalidInput(StrCat("there is no command ", command,
                               "; /help lists them, and a question that begins with a slash is "
                               "written with two"));
  }
  if (!argument.empty()) {
    return InvalidInput(StrCat(command, " stands alone, without \"", argument, "\""));
  }
  return parsed;
}

std::string_view ChatHelp() {
  return "/image FILE  a picture for the next question; several are possible\n"
         "/reset       begin a new conversation\n"
         "/stats       how long the last answer took, and what is left of the conversation\n"
         "/quit        end; so does the end of the input\n"
         "Everything else is a question. <image> in it says where a picture goes.";
}

}  // namespace mvlm
