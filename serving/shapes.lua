-- Refuses what must not share a batch: inputs of another rank or type than the signature's, or with
-- no rows, labels or columns. The server ends at the first where batching is on, and fails a whole
-- batch at the second (README.md, Batching). Rows of different lengths in one request it sees itself.

local MODEL = "align"
local DT_FLOAT, DT_INT32, DT_STRING = 1, 3, 7
local MOST_MARKS = 2000000  -- brackets and quotes of a body in JSON: more take too long
local MOST_DEPTH = 32
local PREDICT = "/tensorflow.serving.PredictionService/Predict"

-- signature: its inputs: type, rank
local SIGNATURES = {
  serving_default = {image_bytes = {DT_STRING, 1}, labels = {DT_STRING, 2}},
  embed_image = {image_bytes = {DT_STRING, 1}},
  embed_text = {texts = {DT_STRING, 1}},
  embed_pixels = {pixel_values = {DT_FLOAT, 4}},
  embed_tokens = {
    input_ids = {DT_INT32, 2},
    attention_mask = {DT_INT32, 2},
    token_type_ids = {DT_INT32, 2},
  },
}

local function refuse(message)
  error({message = message}, 0)
end

local function signature_of(name)
  local found = SIGNATURES[name == "" and "serving_default" or name]
  if not found then refuse("signature_name: not one of the model's") end
  return found
end

-- Checks one input; the rank and the dimensions may be those of a row.
local function check_input(name, expected, rank, dims)
  if rank ~= expected then
    refuse(name .. ": rank " .. rank .. ", expected " .. expected)
  end
  for number = 1, #dims do
    if dims[number] < 1 then refuse(name .. ": expected one or more in each dimension") end
  end
end

-- JSON -------------------------------------------------------------------------------------------

local function skip_space(text, at)
  return text:find("[^ \t\r\n]", at) or refuse("JSON: it ends too early")
end

-- Returns the place after a string's end; the string begins at `at`.
local function string_end(text, at)
  at = at + 1
  while true do
    local found = text:find('["\\]', at) or refuse("JSON: a string has no end")
    if text:byte(found) == 34 then return found + 1 end
    at = found + 2
  end
end

-- Returns a key or a name, and the place after it.
local function name_at(text, at)
  if text:byte(at) ~= 34 then refuse("JSON: expected a string") end
  local stop = string_end(text, at)
  local name = text:sub(at + 1, stop - 2)
  if name:find("\\", 1, true) then refuse("JSON: escapes in names are not taken") end
  return name, stop
end

-- Returns the place after a value.
local function skip(text, at, count)
  local depth = 0
  local letter = text:sub(at, at)
  if letter == '"' then return string_end(text, at) end
  if letter ~= "[" and letter ~= "{" then
    return text:find("[%]},%s]", at) or refuse("JSON: it ends too early")
  end
  while true do
    at = text:find('[%[%]{}"]', at) or refuse("JSON: a list or an object has no end")
    count.marks = count.marks + 1
    if count.marks > MOST_MARKS then refuse("JSON: too many lists or strings, send gRPC") end
    letter = text:sub(at, at)
    if letter == '"' then
      at = string_end(text, at)
    else
      depth = depth + ((letter == "[" or letter == "{") and 1 or -1)
      at = at + 1
      if depth == 0 then return at end
      if depth > MOST_DEPTH then refuse("JSON: nested too deeply") end
    end
  end
end

-- Returns where each member's value of the object at `at` begins, by name, the first of a name, and
-- how many there are.
local function members(text, at, count)
  local found, number = {}, 0
  at = skip_space(text, at + 1)
  while text:sub(at, at) ~= "}" do
    local name
    name, at = name_at(text, at)
    at = skip_space(text, at)
    if text:sub(at, at) ~= ":" then refuse("JSON: expected a colon after a name") end
    at = skip_space(text, at + 1)
    found[name] = found[name] or at
    number = number + 1
    at = skip_space(text, skip(text, at, count))
    if text:sub(at, at) == "," then
      at = skip_space(text, at + 1)
      if text:sub(at, at) == "}" then refuse("JSON: expected a name after a comma") end
    elseif text:sub(at, at) ~= "}" then
      refuse("JSON: expected a comma")
    end
  end
  return found, number
end

-- Returns the rank of the value at `at`, and its dimensions: 0 for one of none, else 1.
local function shape_at(text, at)
  local dims = {}
  while text:sub(at, at) == "[" do
    at = skip_space(text, at + 1)
    if #dims == MOST_DEPTH then refuse("JSON: nested too deeply") end
    dims[#dims + 1] = text:sub(at, at) == "]" and 0 or 1
  end
  return #dims, dims
end

local function is_value(text, at, count)
  if text:sub(at, at) ~= "{" then return true end
  local found, number = members(text, at, count)
  return number == 1 and found.b64 ~= nil
end

-- Checks the inputs that begin at `at`, whose ranks lack `rows` dimensions.
local function check_inputs(text, at, inputs, rows, count)
  local places = {}
  if is_value(text, at, count) then
    local name = next(inputs)
    if next(inputs, name) then refuse("expected an object of inputs by name") end
    places[name] = at
  else
    places = members(text, at, count)
  end
  for name, expected in pairs(inputs) do
    if not places[name] then refuse(name .. ": missing") end
    local rank, dims = shape_at(text, places[name])
    check_input(name, expected[2] - rows, rank, dims)
  end
end

function check_json(text)
  local count = {marks = 0}
  local at = skip_space(text, 1)
  if text:sub(at, at) ~= "{" then refuse("JSON: expected an object") end
  local document = members(text, at, count)
  local name = document.signature_name and name_at(text, document.signature_name) or ""
  local inputs = signature_of(name)
  if document.instances then
    at = document.instances
    if text:sub(at, at) ~= "[" then refuse("instances: expected a list") end
    at = skip_space(text, at + 1)
    if text:sub(at, at) == "]" then refuse("instances: expected one or more") end
    check_inputs(text, at, inputs, 1, count)
  elseif document.inputs then
    check_inputs(text, document.inputs, inputs, 0, count)
  else
    refuse("expected instances or inputs")
  end
end

-- gRPC -------------------------------------------------------------------------------------------

-- Returns the number at `at` of what ends before `stop`, and the place after it. One of a negative
-- sign is more than 2^63.
local function varint(text, at, stop)
  local value, scale = 0, 1
  for _ = 1, 10 do
    if at >= stop then break end
    local byte = text:byte(at)
    value, scale, at = value + byte % 128 * scale, scale * 128, at + 1
    if byte < 128 then return value, at end
  end
  refuse("message: not one of protobuf's")
end

-- Calls `visit(number, value, place, end)` for each field of the message from `at` to `stop`.
local function fields(text, at, stop, visit)
  while at < stop do
    local tag, value
    tag, at = varint(text, at, stop)
    local kind, number = tag % 8, math.floor(tag / 8)
    if kind == 0 then
      value, at = varint(text, at, stop)
      visit(number, value)
    else
      local size = kind == 1 and 8 or kind == 5 and 4
      if kind == 2 then size, at = varint(text, at, stop) end
      if not size or size > stop - at then refuse("message: not one of protobuf's") end
      visit(number, nil, at, at + size)
      at = at + size
    end
  end
end

local function read_shape(text, at, stop, tensor)
  fields(text, at, stop, function(number, value, from, to)
    if number == 3 and value and value ~= 0 then refuse("a tensor's rank is unknown") end
    if number == 2 and from then
      local size = 0
      fields(text, from, to, function(field, given)
        if field == 1 and given then size = given end
      end)
      tensor.dims[#tensor.dims + 1] = size >= 2 ^ 63 and -1 or size
    end
  end)
end

local function read_tensor(text, at, stop, tensor)
  fields(text, at, stop, function(number, value, from, to)
    if number == 1 and value then tensor.dtype = value end
    if number == 2 and from then read_shape(text, from, to, tensor) end
  end)
end

function check_message(text)
  local spec, inputs = {name = "", signature = ""}, {}
  fields(text, 1, #text + 1, function(number, _, from, to)
    if number == 1 and from then
      fields(text, from, to, function(field, _, first, last)
        if field == 1 and first then spec.name = text:sub(first, last - 1) end
        if field == 3 and first then spec.signature = text:sub(first, last - 1) end
      end)
    elseif number == 2 and from then
      local name, tensor = "", {dims = {}, dtype = 0}
      fields(text, from, to, function(field, _, first, last)
        if field == 1 and first then name = text:sub(first, last - 1) end
        if field == 2 and first then read_tensor(text, first, last, tensor) end
      end)
      inputs[name] = tensor
    end
  end)
  if spec.name ~= MODEL then refuse("model_spec: another model than " .. MODEL) end
  for name, expected in pairs(signature_of(spec.signature)) do
    local tensor = inputs[name]
    if not tensor then refuse(name .. ": missing") end
    if tensor.dtype ~= expected[1] then
      refuse(name .. ": dtype " .. tensor.dtype .. ", expected " .. expected[1])
    end
    check_input(name, expected[2], #tensor.dims, tensor.dims)
  end
end

-- Envoy ------------------------------------------------------------------------------------------

local function check(handle, grpc, compressed)
  if compressed then refuse("a compressed body is not taken") end
  local buffer = handle:body(true)
  local text = buffer:getBytes(0, buffer:length())
  if not grpc then return check_json(text) end
  if #text < 5 or text:byte(1) ~= 0 then refuse("a compressed message is not taken") end
  local size = ((text:byte(2) * 256 + text:byte(3)) * 256 + text:byte(4)) * 256 + text:byte(5)
  if size ~= #text - 5 then refuse("expected one message") end
  return check_message(text:sub(6))
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local path = headers:get(":path")
  local grpc = path == PREDICT
  -- Status and metadata pass, and what the routes refuse: predictions come by POST alone.
  if not grpc and (headers:get(":method") ~= "POST" or path:find("^/tensorflow")) then return end
  local compressed = headers:get("content-encoding") ~= nil  -- they are gone once the body is there
  local fine, problem = pcall(check, handle, grpc, compressed)
  if fine then return end
  local message = type(problem) == "table" and problem.message or "the request cannot be read"
  if grpc then
    local status = {["grpc-status"] = "3", ["grpc-message"] = message}
    status[":status"], status["content-type"] = "200", "application/grpc"
    handle:respond(status, "")
  else
    local answer = '{"error": "' .. message .. '"}'
    handle:respond({[":status"] = "400", ["content-type"] = "application/json"}, answer)
  end
end
