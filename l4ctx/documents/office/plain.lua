-- A pandoc filter: what a document says as plain text for a model, without decoration that only costs tokens.
-- Tables become one line a row, headings keep their "#", slides and pictures are marked. What it leaves out is counted
-- on standard error, one line "l4ctx NAME NUMBER" each.

local MOST_TARGET = 200 -- characters of a link's address
local LONG_CELL = 400 -- characters of a table cell that make the table a layout
local RAISED = {["0"] = "⁰", ["1"] = "¹", ["2"] = "²", ["3"] = "³", ["4"] = "⁴", ["5"] = "⁵", ["6"] = "⁶",
  ["7"] = "⁷", ["8"] = "⁸", ["9"] = "⁹", ["+"] = "⁺", ["-"] = "⁻", ["−"] = "⁻", ["n"] = "ⁿ", ["i"] = "ⁱ"}
local LOWERED = {["0"] = "₀", ["1"] = "₁", ["2"] = "₂", ["3"] = "₃", ["4"] = "₄", ["5"] = "₅", ["6"] = "₆",
  ["7"] = "₇", ["8"] = "₈", ["9"] = "₉", ["+"] = "₊", ["-"] = "₋", ["−"] = "₋"}
local stringify = pandoc.utils.stringify
local counts = {pictures = 0, deletions = 0, comments = 0, insertions = 0}

local function count(name) counts[name] = counts[name] + 1 end

local function content(element) return element.content end

local function moved(signs, mark)
  return function(element)
    local found, said = {}, stringify(element.content)
    if said == "" or said:match("^%a+$") or #element.content > 1 then return element.content end -- a note, or as in 1st
    for _, code in utf8.codes(said) do
      local sign = signs[utf8.char(code)]
      if not sign then
        return {pandoc.Str(mark .. "("), pandoc.Span(element.content), pandoc.Str(")")}
      end
      found[#found + 1] = sign
    end
    return pandoc.Str(table.concat(found))
  end
end

local function is_shown(target) return target:match("^https?://") and #target <= MOST_TARGET end

local inlines = {
  traverse = "typewise",
  Emph = content, Strong = content, Underline = content, SmallCaps = content, Cite = content,
  Strikeout = function(element)
    return {pandoc.Str("~~"), pandoc.Span(element.content), pandoc.Str("~~")}
  end,
  Superscript = moved(RAISED, "^"),
  Subscript = moved(LOWERED, "_"),
  Math = function(element) return pandoc.Str("$" .. element.text .. "$") end,
  RawInline = function() return {} end,
  Image = function(element)
    count("pictures")
    local said = stringify(element.caption)
    return pandoc.Str(said == "" and "[picture]" or "[picture: " .. said .. "]")
  end,
  Link = function(element)
    local said = stringify(element.content)
    if not is_shown(element.target) or said == element.target then return element.content end
    return {pandoc.Span(element.content), pandoc.Str(" <" .. element.target .. ">")}
  end,
  Span = function(element)
    local classes = element.classes
    if classes:includes("deletion") then
      count("deletions")
      return {}
    elseif classes:includes("comment-start") then
      count("comments")
      local author = element.attributes["author"] or ""
      return {pandoc.Str("[comment" .. (author == "" and "" or " by " .. author) .. ": "),
        pandoc.Span(element.content), pandoc.Str("]")}
    elseif classes:includes("comment-end") then
      return {}
    elseif classes:includes("insertion") then
      count("insertions")
    end
    return element.content
  end,
}

local function cell_text(blocks)
  if #blocks == 0 then return "" end
  local text
  if #blocks == 1 and (blocks[1].t == "Plain" or blocks[1].t == "Para") and not stringify(blocks):match("[^%g ]") then
    text = stringify(blocks)
  else
    text = pandoc.write(pandoc.Pandoc(blocks), "plain", {wrap_text = "wrap-none"})
  end
  return (text:gsub("%s+", " "):gsub("^ ", ""):gsub(" $", ""))
end

local function row_text(cells)
  local texts, last = {}, 0
  for index, cell in ipairs(cells) do
    texts[index] = cell_text(cell):gsub("|", "\\|")
    if texts[index] ~= "" then last = index end
  end
  if last == 0 then return nil end
  return "| " .. table.concat(texts, " | ", 1, last) .. " |"
end

local function is_layout(rows, columns)
  if columns < 2 then return true end
  for _, row in ipairs(rows) do
    for _, cell in ipairs(row) do
      if #stringify(cell) > LONG_CELL then return true end
      for _, block in ipairs(cell) do
        if block.t == "Table" or block.t == "RawBlock" or block.t == "Header" or block.t == "CodeBlock" then return true end
      end
    end
  end
  return false
end

local function plain_table(element)
  local simple = pandoc.utils.to_simple_table(element)
  local rows = pandoc.List(simple.rows)
  if #simple.headers > 0 then rows:insert(1, simple.headers) end
  local found = pandoc.List()
  if #simple.caption > 0 then found:insert(pandoc.Para(simple.caption)) end
  if is_layout(rows, #element.colspecs) then
    for _, row in ipairs(rows) do
      for _, cell in ipairs(row) do found:extend(cell) end
    end
    return found
  end
  local lines = {}
  for _, row in ipairs(rows) do lines[#lines + 1] = row_text(row) end
  if #lines > 0 then found:insert(pandoc.RawBlock("plain", table.concat(lines, "\n") .. "\n")) end
  return found
end

local function is_empty(blocks) return #blocks == 0 or stringify(blocks):match("^%s*$") ~= nil end

local function full_items(element)
  local items = pandoc.List(element.content):filter(function(item) return not is_empty(item) end)
  if #items == 0 then return {} end
  element.content = items
  return element
end

local blocks = {
  traverse = "typewise",
  Div = function(element)
    if element.classes:includes("notes") then
      return {pandoc.Para("Notes:"), table.unpack(element.content)}
    end
    return element.content
  end,
  Header = function(element)
    if stringify(element.content) == "" then return {} end
    return pandoc.Para({pandoc.Str(("#"):rep(element.level) .. " "), table.unpack(element.content)})
  end,
  Para = function(element) return is_empty({element}) and {} or nil end,
  BulletList = full_items,
  HorizontalRule = function() return pandoc.Para("---") end,
  RawBlock = function(element) return element.format ~= "plain" and {} or nil end,
  Figure = function(element)
    local said = stringify(element.caption.long or {})
    if said == "" or stringify(element.content):find(said, 1, true) then return element.content end
    local found = pandoc.List(element.content)
    found:extend(element.caption.long)
    return found
  end,
  Table = plain_table,
}

-- A slide begins with a heading of level 2 whose identifier is its number.
local function with_slides(found)
  local marked, is_open = pandoc.List(), false
  for _, block in ipairs(found) do
    local number = block.t == "Header" and block.level == 2 and block.identifier:match("^slide%-(%d+)$")
    if number then
      if is_open then marked:insert(pandoc.RawBlock("plain", "</slide>")) end
      marked:insert(pandoc.RawBlock("plain", '<slide number="' .. number .. '">'))
      is_open = true
      if stringify(block) == "Slide " .. number then block = nil end -- it has no title
    end
    if block then marked:insert(block) end
  end
  if is_open then marked:insert(pandoc.RawBlock("plain", "</slide>")) end
  return marked
end

local function front(meta)
  local found = pandoc.List()
  for _, name in ipairs({"title", "subtitle", "author", "creator", "date", "abstract"}) do
    local value = meta[name]
    local values = pandoc.utils.type(value) == "List" and value or {value}
    for _, each in ipairs(values) do
      local said = stringify(each)
      if said ~= "" then found:insert(pandoc.Para((name == "title" and "# " or "") .. said)) end
    end
  end
  return found
end

function Pandoc(document)
  if stringify(document.meta["l4ctx-format"] or "") == "pptx" then document.blocks = with_slides(document.blocks) end
  local whole = front(document.meta)
  whole:extend(document.blocks)
  local walked = pandoc.Pandoc(whole):walk(inlines):walk(blocks)
  for name, number in pairs(counts) do io.stderr:write("l4ctx ", name, " ", number, "\n") end
  return walked
end
