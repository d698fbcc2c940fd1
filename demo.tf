# demo.tf - an example to copy from, and what `make demo' runs.
#
#	make run                the server, on 127.0.0.1:8080, states in ./states
#	terraform init          in another terminal, here
#	terraform apply
#	cat states/demo.tfstate

terraform {
  backend "http" {
    # The state's name is the path: states/demo.tfstate. Slashes make
    # directories, as in /team/prod/network.
    address = "http://127.0.0.1:8080/demo"

    # The same address locks and unlocks it. Without these two lines
    # terraform does not lock, and two runs at once can undo each other.
    lock_address   = "http://127.0.0.1:8080/demo"
    unlock_address = "http://127.0.0.1:8080/demo"

    # Credentials do not belong here, where terraform would copy them into
    # plan files: set TF_HTTP_USERNAME and TF_HTTP_PASSWORD instead.
  }
}

# Your resources come here. These need no provider, so nothing is downloaded.

variable "greeting" {
  default = "hello"
}

resource "terraform_data" "greeting" {
  input = var.greeting
}

resource "terraform_data" "copy" {
  input            = "${terraform_data.greeting.output}, state server"
  triggers_replace = terraform_data.greeting.id
}

output "greeting" {
  value = terraform_data.copy.output
}
